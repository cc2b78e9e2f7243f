"""An index whose vectors live on a Chroma server, a real one started for the test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from exl2_rag.errors import RetrievalError
from exl2_rag.retrieval import Document, DocumentIndex, Retriever
from exl2_rag.retrieval.chroma_store import ChromaStore
from tests.retrieval.test_index import assert_consistent
from tests.retrieval.word_embedder import WordEmbedder


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    program = Path(sys.executable).parent / "chroma"
    if not program.exists():
        pytest.skip("needs the chroma program beside the interpreter")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(program), "run", "--path", str(tmp_path_factory.mktemp("server")), "--port", str(port)]
    environment = {**os.environ, "ANONYMIZED_TELEMETRY": "False"}
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as running:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api/v2/heartbeat", timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        yield url
        running.terminate()


def test_two_indexes_on_one_server_keep_apart(server, tmp_path) -> None:
    first = DocumentIndex.create_or_open(tmp_path / "one", embedder=WordEmbedder(), store=server)
    second = DocumentIndex.create_or_open(tmp_path / "two", embedder=WordEmbedder(), store=server)
    with first, second:
        first.add([Document("cats", "Cats", "Cats sleep most of the day.", "text/plain")])
        second.add([Document("dogs", "Dogs", "Dogs bark at strangers.", "text/plain")])
        for index, source in ((first, "cats"), (second, "dogs")):
            assert_consistent(index)
            assert [found.chunk.source for found in Retriever(index).retrieve("who sleeps and barks?", 5)] == [source]
    with DocumentIndex.open(tmp_path / "one", embedder=WordEmbedder()) as again:
        assert_consistent(again)
        assert again.delete_source("cats") == 1
        assert again.store.count() == 0


def test_no_server_at_the_url_is_an_error_that_names_it(tmp_path) -> None:
    with pytest.raises(RetrievalError, match=r"127\.0\.0\.1:9.*check the server"):
        ChromaStore("http://127.0.0.1:9", dimension=8)

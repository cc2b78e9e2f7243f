"""A process killed in the middle of an update: the next one finds an index it can repair, and finishes the work."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exl2_rag.retrieval import DocumentIndex, Retriever
from exl2_rag.retrieval.manifest import Manifest
from tests.retrieval.test_index import assert_consistent
from tests.retrieval.word_embedder import WordEmbedder

# Runs one update and kills itself, without any chance to clean up, around a given call.
KILLED = """
import os, signal, sys
from exl2_rag.retrieval import DocumentIndex
from exl2_rag.retrieval.manifest import Manifest
from tests.retrieval.word_embedder import WordEmbedder

index_path, docs, store, where, when = sys.argv[1:]
index = DocumentIndex.create_or_open(index_path, embedder=WordEmbedder(), store=store)
owner, name = (index.store, where) if where in ("upsert", "delete") else (Manifest, where)
original = getattr(owner, name)

def killing(*args, **kwargs):
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    original(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, killing)
index.update(docs)
print("was not killed")
"""


def write_docs(folder: Path, version: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("one", "two", "three"):
        (folder / f"{name}.md").write_text(f"# {name}\n\nDocument {name} in version {version}.", encoding="utf-8")
    if version == "new":
        (folder / "three.md").unlink()


def killed_update(index: Path, docs: Path, store: str, where: str, when: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(index), str(docs), store, where, when],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("store", "where", "when"),
    [
        ("exact", "upsert", "before"),
        ("exact", "upsert", "after"),
        ("exact", "replace", "after"),
        ("exact", "delete", "after"),
        ("exact", "remove", "after"),
        ("exact", "mark_clean", "before"),
        ("chroma", "upsert", "after"),
        ("chroma", "replace", "after"),
    ],
)
def test_an_update_killed_at_any_point_is_repaired_and_finished_by_the_next(tmp_path, store, where, when) -> None:
    docs, path = tmp_path / "docs", tmp_path / "index"
    write_docs(docs, "old")
    with DocumentIndex.create_or_open(path, embedder=WordEmbedder(), store=store) as index:
        index.update(docs)
    write_docs(docs, "new")
    killed_update(path, docs, store, where, when)

    manifest = Manifest.open(path / "manifest.sqlite")
    assert manifest.dirty, "the kill left no trace, so the test proves nothing"
    manifest.close()
    with DocumentIndex.open(path, embedder=WordEmbedder()) as index:
        assert_consistent(index)
        index.update(docs)
        assert_consistent(index)
        assert [chunk.text for chunk in index.chunks()] == [
            "Document one in version new.",
            "Document two in version new.",
        ]
        assert Retriever(index).retrieve("version new of two", 1)[0].chunk.source == "two.md"


def test_an_update_cut_short_by_an_error_is_repaired_by_the_next_in_the_same_process(tmp_path, monkeypatch) -> None:
    docs = tmp_path / "docs"
    write_docs(docs, "old")
    with DocumentIndex.create_or_open(tmp_path / "index", embedder=WordEmbedder(), store="exact") as index:
        index.update(docs)
        write_docs(docs, "new")

        def fails(*_args) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Manifest, "replace", fails)
            with pytest.raises(KeyboardInterrupt):
                index.update(docs)
        write_docs(docs, "old")  # so that nobody asks again for what was already in the store
        assert index.update(docs).indexed == []
        assert_consistent(index)

"""A document that leaves the index leaves the KV store as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from exl2_rag.llm.api import ExL2LLM
from exl2_rag.llm.kv_store.maintenance import stored_sources
from exl2_rag.qa import DocumentQA, QASettings
from exl2_rag.qa.kv_sources import document_positions, kv_source, purge_changed
from exl2_rag.retrieval.index import DocumentIndex
from tests.retrieval.word_embedder import WordEmbedder
from tests.support.synthetic import make_model_dir


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([("a", [5, 6]), ("b", [7])], {"a": 2, "b": 4}),
        ([("a", [5, 6]), ("a", [7])], {"a": 2}),
        ([("b", [7]), ("a", [5, 6])], {"a": 2, "b": 4}),
        ([("a", [5, 6]), ("changed", [9, 9])], {"a": 2, "changed": 4}),
        ([("changed", [9, 9]), ("b", [7])], {"b": 4, "changed": 0}),
        ([("empty", [])], {"empty": 0}),
        ([], {}),
    ],
)
def test_a_document_begins_where_its_block_stands_or_earlier(blocks, expected) -> None:
    assert document_positions([1, 2, 5, 6, 7, 8], blocks) == expected


def test_documents_that_leave_the_index_leave_the_store(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_model_dir(tmp_path / "model", quantised=True, max_position=4096)
    docs, store = tmp_path / "docs", tmp_path / "store"
    docs.mkdir()
    for name in ("cats", "dogs", "birds"):
        (docs / f"{name}.txt").write_text(f"Some words about {name} and how they sleep. " * 4)
    with DocumentIndex.create_or_open(tmp_path / "index", store="exact", embedder=WordEmbedder()) as index:
        index.update(docs)
        with ExL2LLM(model, cache_tokens=4096, kv_store=store) as llm:
            qa = DocumentQA(llm, index, QASettings(max_tokens=16))
            for question in ("How do cats sleep?", "How do dogs sleep?", "Who sleeps?"):
                qa.ask(question, k=3)
            index.delete_source("cats.txt")
            assert qa.purge(["cats.txt"]) > 0
            assert qa.purge(["cats.txt"]) == 0
            for question in ("How do dogs sleep?", "Who sleeps?"):
                qa.ask(question, k=3)
        names = {kv_source(index.index_id, f"{name}.txt") for name in ("dogs", "birds")}
        assert stored_sources(store) == names
        (docs / "cats.txt").unlink()
        (docs / "dogs.txt").unlink()
        (docs / "birds.txt").write_text("Birds have changed.")
        index.delete_source("dogs.txt")  # by an update that was killed before it came to the store
        report = index.update(docs)
        assert purge_changed(store, index, report) > 0
        assert stored_sources(store) == set()
        assert purge_changed(tmp_path / "no store", index, report) == 0

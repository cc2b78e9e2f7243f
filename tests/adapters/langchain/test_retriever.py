"""`ExL2Retriever` for LangChain over a small real index."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pydantic import ValidationError

from exl2_rag.adapters.langchain import ExL2Retriever
from exl2_rag.errors import RequestError
from exl2_rag.retrieval.index import DocumentIndex
from exl2_rag.retrieval.retriever import Retriever


class TestExL2RetrieverStandard(RetrieversIntegrationTests):
    index: DocumentIndex

    @pytest.fixture(autouse=True)
    def _index(self, document_index: DocumentIndex) -> None:
        self.index = document_index

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return ExL2Retriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"index": self.index}

    @property
    def retriever_query_example(self) -> str:
        return "How many tokens does a page hold?"


async def test_documents_carry_text_place_and_score(document_index: DocumentIndex) -> None:
    retriever = ExL2Retriever(index=document_index, k=2)
    best = retriever.invoke("How many tokens does a page hold?")[0]
    assert "A page holds 32 tokens" in best.page_content
    about = best.metadata
    assert (about["source"], about["title"], about["page"]) == ("manual/engine.md", "Engine manual", None)
    text = document_index.document_text("manual/engine.md")
    assert text[about["start"] : about["end"]] == best.page_content
    assert document_index.chunk(str(best.id)).label == about["label"]
    assert 0 <= about["score"] <= 1
    again = await retriever.ainvoke("How many tokens does a page hold?")
    assert [document.id for document in again][:1] == [best.id]


def test_pages_are_told_where_there_are_any(document_index: DocumentIndex) -> None:
    best = ExL2Retriever(index=document_index).invoke("Do dogs bark?", k=1)
    assert [(document.metadata["source"], document.metadata["page"]) for document in best] == [("pets.pdf", 2)]


def test_a_retriever_with_its_own_settings_is_taken(document_index: DocumentIndex) -> None:
    words_only = Retriever(document_index, dense_weight=0.0)
    assert "preempts" in ExL2Retriever(index=words_only).invoke("youngest request", k=1)[0].page_content


def test_mistakes_are_errors(document_index: DocumentIndex) -> None:
    with pytest.raises(ValidationError, match=r"got str; open one with DocumentIndex\.open"):
        ExL2Retriever(index="some/dir")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        ExL2Retriever(index=document_index, k=0)
    with pytest.raises(ValidationError, match="top_k"):
        ExL2Retriever(index=document_index, top_k=3)  # type: ignore[call-arg]
    with pytest.raises(RequestError):
        ExL2Retriever(index=document_index).invoke("Hi", k=0)
    assert "DocumentIndex" not in repr(ExL2Retriever(index=document_index))

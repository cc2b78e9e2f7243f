"""Retriever and citation synthesizer in LlamaIndex query engines, over a real engine and index."""

from __future__ import annotations

import pytest
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

from exl2_rag import ExL2LLM
from exl2_rag.adapters.llama_index import DECLINED_TEXT, ExL2CitationSynthesizer, ExL2Retriever
from exl2_rag.errors import SettingsError
from exl2_rag.qa.settings import QASettings
from exl2_rag.retrieval.index import DocumentIndex
from exl2_rag.retrieval.retriever import Retriever

QUESTION = "How many tokens does a page hold?"
# A model of random weights answers some and declines others.
QUESTIONS = ["What is a page?", "Do cats sleep?", "Who?", "How many metres?", "Is it tail first?", "When?", "Why so?"]
SETTINGS = QASettings(k=2, quote_unit="sentence", max_claims=2, max_text_chars=20, max_tokens=200)


@pytest.fixture
def engine(llm: ExL2LLM, document_index: DocumentIndex) -> RetrieverQueryEngine:
    return RetrieverQueryEngine(
        retriever=ExL2Retriever(document_index, k=2),
        response_synthesizer=ExL2CitationSynthesizer(llm, document_index, SETTINGS),
    )


# Retriever


async def test_nodes_carry_text_place_and_score(document_index: DocumentIndex) -> None:
    retriever = ExL2Retriever(document_index, k=2)
    best = retriever.retrieve(QUESTION)[0]
    about = best.node.metadata
    assert "A page holds 32 tokens" in best.node.get_content()
    assert (about["source"], about["page"]) == ("manual/engine.md", None)
    text = document_index.document_text("manual/engine.md")
    assert text[about["start"] : about["end"]] == best.node.get_content()
    assert best.score is not None
    assert 0 <= best.score <= 1
    assert (await retriever.aretrieve(QUESTION))[0].node_id == best.node_id
    assert len(retriever.retrieve(QUESTION)) == 2


def test_prompts_show_what_stays_the_same_from_question_to_question(document_index: DocumentIndex) -> None:
    shown = ExL2Retriever(document_index, k=1).retrieve(QUESTION)[0].node.get_content(MetadataMode.LLM)
    assert shown.startswith("title: Engine manual")
    assert "score" not in shown
    assert "label" not in shown


def test_a_retriever_with_its_own_settings_is_taken(document_index: DocumentIndex) -> None:
    words_only = Retriever(document_index, dense_weight=0.0)
    assert "preempts" in ExL2Retriever(words_only, k=1).retrieve("youngest request")[0].node.get_content()


def test_mistakes_of_the_retriever_are_errors(document_index: DocumentIndex) -> None:
    with pytest.raises(SettingsError, match="got str"):
        ExL2Retriever("some/dir")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="k must be at least 1"):
        ExL2Retriever(document_index, k=0)


# Query engine


async def test_responses_cite_the_documents_on_both_ways(
    engine: RetrieverQueryEngine, document_index: DocumentIndex
) -> None:
    citations = []
    for question in QUESTIONS:
        first, second = engine.query(question), await engine.aquery(question)
        assert first.response == second.response
        assert first.metadata["citations"] == second.metadata["citations"]
        assert first.metadata["answerable"] == bool(first.metadata["citations"])
        assert (first.response == DECLINED_TEXT) != first.metadata["answerable"]
        assert len(first.source_nodes) == 2
        citations += first.metadata["citations"]
    assert citations
    for citation in citations:
        text = document_index.document_text(citation["source"])
        assert text[citation["start"] : citation["end"]] == citation["quote"]
        assert citation["match"] == "exact"


def test_the_same_question_again_is_read_from_the_cache(engine: RetrieverQueryEngine) -> None:
    engine.query("Who preempts whom?")
    usage = engine.query("Who preempts whom?").metadata["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 1


def test_without_nodes_the_answer_is_declined(llm: ExL2LLM, document_index: DocumentIndex) -> None:
    response = ExL2CitationSynthesizer(llm.as_llama_index(), document_index, SETTINGS).synthesize(QUESTION, [])
    assert response.response == DECLINED_TEXT
    assert response.metadata == {
        "answerable": False,
        "citations": [],
        "usage": {
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "total_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_what_cannot_be_cited_is_refused(llm: ExL2LLM, document_index: DocumentIndex) -> None:
    synthesizer = ExL2CitationSynthesizer(llm, document_index, SETTINGS)
    stranger = NodeWithScore(node=TextNode(text="From elsewhere.", metadata={"source": "x"}), score=1.0)
    with pytest.raises(SettingsError, match="expected nodes from an ExL2Retriever"):
        synthesizer.synthesize(QUESTION, [stranger])
    with pytest.raises(SettingsError, match="needs nodes"):
        synthesizer.get_response(QUESTION, ["text"])
    with pytest.raises(SettingsError, match="needs nodes"):
        await synthesizer.aget_response(QUESTION, ["text"])
    with pytest.raises(SettingsError, match="unknown option 'verbose'"):
        synthesizer.synthesize(QUESTION, [], verbose=True)


def test_llama_indexs_own_synthesizer_works_too(llm: ExL2LLM, document_index: DocumentIndex) -> None:
    model = llm.as_llama_index(temperature=0, max_tokens=16)
    engine = RetrieverQueryEngine(
        retriever=ExL2Retriever(document_index, k=1), response_synthesizer=get_response_synthesizer(llm=model)
    )
    assert str(engine.query(QUESTION))

"""Retrieval: both searches count, filters hold, what cannot be asked is refused."""

from __future__ import annotations

import pytest

from exl2_rag.errors import RequestError, RetrievalError, SettingsError, TextTooLongError
from exl2_rag.retrieval import Document, DocumentIndex, Retriever
from tests.retrieval.word_embedder import WordEmbedder

TEXTS = {
    "pages": "The page table shares pages between requests with equal prefixes.",
    "quotes": "A quote is verified against the document it cites.",
    "sampling": "Sampling draws a token from the distribution of the model.",
    "eviction": "Pages are evicted from the tail of the least recently used chain.",
}


@pytest.fixture(params=["exact", "chroma"], scope="module")
def index(request, tmp_path_factory) -> DocumentIndex:
    path = tmp_path_factory.mktemp("index")
    with DocumentIndex.create_or_open(path, embedder=WordEmbedder(), store=request.param) as opened:
        opened.add(Document(source, source.title(), text, "text/plain") for source, text in TEXTS.items())
        yield opened


def sources(found) -> list[str]:
    return [scored.chunk.source for scored in found]


@pytest.mark.parametrize("fusion", ["score", "rank"])
def test_the_best_chunk_comes_first_and_scores_descend(index, fusion) -> None:
    found = Retriever(index, fusion=fusion).retrieve("Which quote is verified?", 4)
    assert found[0].chunk.source == "quotes"
    assert found[0].chunk.text == TEXTS["quotes"]
    scores = [scored.score for scored in found]
    assert scores == sorted(scores, reverse=True)


def test_a_weight_at_either_end_leaves_one_search_alone(index) -> None:
    # No word in common by stem with "sampling" but one: only BM25 stems.
    question = "sampled tokens"
    assert sources(Retriever(index, dense_weight=0.0).retrieve(question, 1)) == ["sampling"]
    dense = Retriever(index, dense_weight=1.0).retrieve("pages from the tail", 4)
    query = index.embedder.embed(["pages from the tail"])[0]
    expected = index.store.query(query, 4)
    assert dense[0].chunk.chunk_id == expected[0][0]


def test_a_score_does_not_depend_on_how_many_candidates_each_search_gives(index) -> None:
    for question in ("sampled from the tail", "citing the page", "evict a token"):
        by_vector, by_words = (Retriever(index, dense_weight=weight).retrieve(question, 1)[0] for weight in (1.0, 0.0))
        assert by_vector.chunk != by_words.chunk, "both searches agree, so nothing has to be looked up"
        few, many = (Retriever(index, candidates=n).retrieve(question, 1)[0] for n in (1, 50))
        assert few.chunk == many.chunk
        assert few.score == pytest.approx(many.score, abs=1e-5)


def test_k_beyond_the_index_gives_what_there_is(index) -> None:
    assert len(Retriever(index, candidates=1).retrieve("pages", 100)) == 4


def test_a_filter_by_source_keeps_to_those_documents(index) -> None:
    retriever = Retriever(index)
    assert set(sources(retriever.retrieve("pages", 4, sources=["sampling", "quotes"]))) == {"sampling", "quotes"}
    assert sources(retriever.retrieve("pages evicted", 4, sources=["eviction", "eviction"])) == ["eviction"]
    with pytest.raises(RetrievalError, match="no document"):
        retriever.retrieve("pages", sources=["nobody"])


def test_many_questions_give_what_each_alone_gives(index) -> None:
    retriever = Retriever(index)
    questions = ["page table", "verified quote", "token"]
    together = retriever.retrieve_many(questions, 2)
    assert together == [retriever.retrieve(question, 2) for question in questions]
    assert retriever.retrieve_many([], 2) == []


def test_a_question_without_any_known_word_still_gets_neighbours(index) -> None:
    assert len(Retriever(index).retrieve("zyzzyva", 2)) == 2


def test_an_empty_index_finds_nothing(tmp_path) -> None:
    with DocumentIndex.create_or_open(tmp_path, embedder=WordEmbedder(), store="exact") as index:
        assert Retriever(index).retrieve("anything", 3) == []


def test_what_cannot_be_asked_is_refused(index) -> None:
    retriever = Retriever(index)
    with pytest.raises(RequestError, match="empty"):
        retriever.retrieve("  ")
    with pytest.raises(RequestError, match="k must be at least 1"):
        retriever.retrieve("page", 0)
    with pytest.raises(TextTooLongError):
        retriever.retrieve("word " * 100)


@pytest.mark.parametrize("options", [{"fusion": "sum"}, {"dense_weight": 1.5}, {"candidates": 0}])
def test_settings_out_of_range_are_refused(index, options) -> None:
    with pytest.raises(SettingsError, match=next(iter(options))):
        Retriever(index, **options)

"""Chunks stand in the prompt in the order that the engine's cache can go on with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from exl2_rag import ExL2LLM
from exl2_rag.errors import SettingsError
from exl2_rag.llm.chat_template import ChatTemplate, encode_chat
from exl2_rag.llm.tokenizer import Tokenizer
from exl2_rag.qa.chunk_order import ChunkPopularity, deepest_cached
from exl2_rag.qa.pipeline import DocumentQA
from exl2_rag.qa.prompt import DECLINED, build_messages
from exl2_rag.qa.settings import QASettings
from exl2_rag.retrieval.document import Chunk
from tests.qa.support import CACHE, DELIMITER, PAGES, PETS, ListedChunks, ScriptedEngine
from tests.support.byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer
from tests.support.synthetic import make_model_dir
from tests.support.tokenizer_families import FAMILIES, family

LABELS = ["d1", "d2", "d10"]  # PETS, PAGES, CACHE
# The documents right after a special token, where some tokenizers put a space before them.
BARE_TEMPLATE = "{{ bos_token }}{{ messages[1].content }}{{ messages[0].content }}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory)
    return Tokenizer.from_dir(directory)


def shown(prompt: str) -> list[str]:
    """Labels in the order in which a prompt shows them."""
    found = [part.partition(">>")[0] for part in prompt.split(f"<<{DELIMITER} ")[1:]]
    assert found[-1] == "question"
    return found[:-1]


def ask(qa: DocumentQA, question: str = "What is a page?") -> list[str]:
    qa.ask(question)
    return shown(qa.llm.prompts[-1])  # type: ignore[attr-defined]


def qa_of(tokenizer: Tokenizer, order: Any, *chunks: Chunk) -> DocumentQA:
    engine = ScriptedEngine(tokenizer, DECLINED)
    return DocumentQA(engine, ListedChunks(*chunks), QASettings(order=order))  # type: ignore[arg-type]


def test_by_default_chunks_go_on_from_what_the_cache_holds(tokenizer: Tokenizer) -> None:
    qa = qa_of(tokenizer, "canonical", CACHE, PETS, PAGES)
    assert ask(qa) == LABELS
    qa.llm.order = lambda count: list(range(count))[::-1]  # type: ignore[attr-defined]
    assert ask(qa) == LABELS[::-1]
    assert qa.llm.prefixes[-1].endswith("<|user|>")  # type: ignore[attr-defined]


def test_what_the_cache_does_not_decide_goes_by_popularity_then_by_label(tokenizer: Tokenizer) -> None:
    qa = qa_of(tokenizer, "canonical", CACHE, PETS, PAGES)
    qa.retriever.chunks = (CACHE, PAGES)  # type: ignore[attr-defined]
    assert ask(qa) == ["d2", "d10"]
    qa.retriever.chunks = (CACHE,)  # type: ignore[attr-defined]
    assert ask(qa) == ["d10"]
    qa.retriever.chunks = (CACHE, PETS, PAGES)  # type: ignore[attr-defined]
    assert ask(qa) == ["d10", "d2", "d1"]


def test_the_order_of_labels_and_that_of_relevance_ask_no_cache(tokenizer: Tokenizer) -> None:
    for order, expected in (("label", LABELS), ("relevance", ["d10", "d1", "d2"])):
        qa = qa_of(tokenizer, order, CACHE, PETS, PAGES)
        for _ in range(2):
            assert ask(qa) == expected
        assert qa.llm.prefixes == []  # type: ignore[attr-defined]


def test_an_order_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingsError, match='order must be "canonical", "label" or "relevance"'):
        QASettings(order="random")  # type: ignore[arg-type]


class RecordingCache:
    """Notes what it is asked and turns the order round."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.asked: list[tuple[list[int], list[list[int]], list[list[int]]]] = []

    def cached_order(
        self, prefix: Sequence[int], blocks: Sequence[Sequence[int]], *, first: Sequence[Sequence[int]] | None = None
    ) -> list[int]:
        assert first is not None
        self.asked.append((list(prefix), [list(one) for one in blocks], [list(one) for one in first]))
        return list(range(len(blocks)))[::-1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("source", [CHAT_TEMPLATE, BARE_TEMPLATE], ids=["chat", "bare"])
def test_the_blocks_asked_about_are_those_of_the_prompt_in_every_tokenizer(name: str, source: str) -> None:
    tokenizer = family(name)
    bos = tokenizer.decode([tokenizer.bos_token_id], skip_special=False) if tokenizer.bos_token_id is not None else ""
    template = ChatTemplate({"default": source}, variables={"bos_token": bos}, origin="a test")
    chunks = [PETS, PAGES, CACHE]

    def prompt(order: Sequence[Chunk]) -> list[int]:
        return encode_chat(tokenizer, template, build_messages("Why?", order, DELIMITER, keep_order=True))

    cache = RecordingCache(tokenizer)
    assert deepest_cached(cache, chunks, DELIMITER, prompt(chunks)) == chunks[::-1]
    prefix, blocks, first = cache.asked[0]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        expected = [*prefix, *first[order[0]], *(token for one in order[1:] for token in blocks[one])]
        assert prompt([chunks[one] for one in order])[: len(expected)] == expected


def test_a_prompt_that_shows_something_else_keeps_its_order(tokenizer: Tokenizer) -> None:
    cache = RecordingCache(tokenizer)
    assert deepest_cached(cache, [PETS, PAGES], DELIMITER, list(range(200))) == [PETS, PAGES]
    assert deepest_cached(cache, [PETS], DELIMITER, [1, 2, 3]) == [PETS]
    assert cache.asked == []


def test_popularity_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exl2_rag.qa.chunk_order.MAX_COUNTED", 10)
    popularity = ChunkPopularity()
    for number in range(100):
        popularity.note([PETS, replace(PAGES, label=f"d{number + 100}")])
    assert popularity.sort([PAGES, replace(PAGES, label="d5"), PETS]) == [PETS, PAGES, replace(PAGES, label="d5")]
    assert len(popularity._shown) <= 11


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExL2LLM]:
    directory = make_model_dir(tmp_path_factory.mktemp("model") / "model", max_position=4096)
    with ExL2LLM(directory, cache_tokens=1 << 13) as one:
        yield one


def test_a_real_engine_reuses_what_another_order_would_compute_again(llm: ExL2LLM) -> None:
    """d2 and d10 are asked about first; then d1 joins them, and would stand before both by label."""
    reused = {}
    for order in ("label", "canonical"):
        llm.evict(everything=True)
        chunks = ListedChunks(PAGES, CACHE)
        qa = DocumentQA(llm, chunks, QASettings(order=order, max_tokens=16))  # type: ignore[arg-type]
        qa.ask_many(["What is a page?"])
        chunks.chunks = (PAGES, CACHE, PETS)
        answer = qa.ask_many(["Who barks?"])[0]
        reused[order] = answer.usage.cached_tokens
    assert reused["canonical"] > reused["label"] + len(PAGES.text) + len(CACHE.text)  # a token is a byte

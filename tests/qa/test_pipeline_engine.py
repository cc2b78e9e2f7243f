"""The pipeline over the real engine: random weights have no sense, and still cannot quote what is not there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from exl2_rag.errors import EngineClosedError
from exl2_rag.llm.api import ExL2LLM
from exl2_rag.llm.constraint import Regex
from exl2_rag.qa.pipeline import DocumentQA
from exl2_rag.qa.settings import QASettings
from tests.qa.support import CACHE, ENGINE_DOC, PAGES, PETS, PETS_DOC, ListedChunks
from tests.support.synthetic import make_model_dir

TEXTS = {ENGINE_DOC.source: ENGINE_DOC.text, PETS_DOC.source: PETS_DOC.text}
WARM = QASettings(temperature=20.0, max_tokens=700, max_text_chars=40)


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "exl2"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExL2LLM]:
    directory = make_model_dir(tmp_path_factory.mktemp("model"), quantised=request.param, max_position=4096)
    with ExL2LLM(directory, cache_tokens=1 << 14) as engine:
        yield engine


def qa_over(llm: ExL2LLM, settings: QASettings, *chunks: Any) -> DocumentQA:
    return DocumentQA(llm, ListedChunks(*(chunks or (CACHE, PETS, PAGES))), settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["span", "sentence"])
def test_every_quote_of_a_random_model_stands_at_its_offsets(llm: ExL2LLM, unit: Any) -> None:
    answers = qa_over(llm, replace(WARM, quote_unit=unit)).ask_many([f"Question {n}?" for n in range(40)])
    claims = [claim for answer in answers for claim in answer.claims]
    assert len(claims) > 3  # or this test would say nothing
    for answer in answers:
        assert answer.failure == ""
        assert answer.rejected == ()
        assert answer.answerable == bool(answer.claims)
    for claim in claims:
        citation = claim.citation
        assert citation.match == "exact"
        assert TEXTS[citation.source][citation.start : citation.end] == citation.quote


def test_the_next_question_finds_everything_up_to_itself_in_the_cache(llm: ExL2LLM) -> None:
    qa = qa_over(llm, QASettings(max_tokens=16), PAGES, PETS)
    first = qa.ask("What is a page?")
    second = qa.ask("Who barks?")
    n_second = len("Who barks?") + len(["<|end|>", "<|assistant|>"])
    assert second.usage.cached_tokens >= second.usage.prompt_tokens - n_second
    assert first.usage.prompt_tokens > 10 * n_second  # a long prompt, of which only the question was computed again


def test_answers_of_a_batch_are_those_given_one_by_one(llm: ExL2LLM) -> None:
    qa = qa_over(llm, QASettings(max_tokens=64))
    questions = ["What is a page?", "Who barks?", "What is a page?", "Why?"]
    together = qa.ask_many(questions)
    alone = [qa.ask(question) for question in questions]
    assert [answer.raw for answer in together] == [answer.raw for answer in alone]
    assert [answer.claims for answer in together] == [answer.claims for answer in alone]


def test_a_reply_cut_off_at_max_tokens_is_marked(llm: ExL2LLM) -> None:
    answers = qa_over(llm, replace(WARM, max_tokens=40)).ask_many([f"Question {n}?" for n in range(6)])
    cut = [answer for answer in answers if answer.usage.completion_tokens == 40]
    assert cut
    for answer in cut:
        assert answer.truncated
        assert not answer.answerable


async def test_async_questions_get_the_answers_of_sync_ones(llm: ExL2LLM) -> None:
    qa = qa_over(llm, QASettings(max_tokens=64))
    questions = ["What is a page?", "Who barks?", "Why?"]
    answers = await asyncio.gather(*map(qa.aask, questions))
    assert [answer.raw for answer in answers] == [qa.ask(question).raw for question in questions]


async def test_a_cancelled_question_frees_its_place(llm: ExL2LLM) -> None:
    class LongWinded(DocumentQA):
        def _constraint(self, chunks: Any) -> Any:
            return Regex("[a-z]{1500}")

    qa = LongWinded(llm, ListedChunks(PAGES), QASettings(max_tokens=2000))  # type: ignore[arg-type]
    task = asyncio.ensure_future(qa.aask("Why?"))
    while llm.active_requests == 0:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert llm.active_requests == 0


def test_a_closed_engine_is_an_error_not_a_failed_answer(tmp_path: Any) -> None:
    engine = ExL2LLM(make_model_dir(tmp_path, max_position=4096), cache_tokens=1 << 13)
    qa = qa_over(engine, QASettings())
    engine.close()
    with pytest.raises(EngineClosedError):
        qa.ask_many(["What is a page?", "Who barks?"])

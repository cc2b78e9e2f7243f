"""One computed prompt, continued many times: `fork_point` and `generate_many`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from exl2_rag import Choice, ExL2LLM, SamplingParams
from exl2_rag.errors import ConstraintError, RequestError
from exl2_rag.llm.request import GenerationRequest
from tests.support.synthetic import make_model_dir

GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
DOCUMENT = "The cat sat on the mat, and the dog lay by the door all day long. " * 3
QUESTIONS = [f" Question {n}: what did the {what} do?" for n, what in enumerate(("cat", "dog", "door", "mat", "day"))]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[ExL2LLM]:
    with ExL2LLM(model_dir, max_batch_size=8) as one:
        yield one


def expected(llm: ExL2LLM, prompt: str, continuation: str) -> tuple[int, ...]:
    tokenizer = llm.tokenizer
    token_ids = [*tokenizer.encode(prompt, add_bos=tokenizer.adds_bos), *tokenizer.encode_continuation(continuation)]
    return llm.generate(token_ids, GREEDY, cache_salt="somebody else").token_ids


def test_many_questions_about_one_text_share_its_pages(llm: ExL2LLM) -> None:
    results = llm.generate_many(DOCUMENT, QUESTIONS, GREEDY)
    assert [one.token_ids for one in results] == [expected(llm, DOCUMENT, question) for question in QUESTIONS]
    n_document = len(llm.tokenizer.encode(DOCUMENT, add_bos=llm.tokenizer.adds_bos))
    assert [one.usage.cached_tokens >= n_document for one in results] == [False, True, True, True, True]
    assert llm.cache_report().pinned_pages == 0


def test_a_fork_point_is_continued_alone_together_and_piece_by_piece(llm: ExL2LLM) -> None:
    with llm.fork_point(DOCUMENT) as point:
        assert llm.cache_report().pinned_pages == -(-point.n_tokens // llm.engine_config.page_size)
        alone = point.generate(QUESTIONS[0], GREEDY)
        together = point.generate(QUESTIONS, GREEDY)
        streamed = list(point.stream(QUESTIONS[0], GREEDY))
        nothing_added = point.generate("", GREEDY)
    assert alone.token_ids == together[0].token_ids == expected(llm, DOCUMENT, QUESTIONS[0])
    assert tuple(token for piece in streamed for token in piece.token_ids) == alone.token_ids
    assert nothing_added.token_ids == expected(llm, DOCUMENT, "")
    assert llm.cache_report().pinned_pages == 0
    point.release()
    assert point.generate(QUESTIONS[0], GREEDY).token_ids == alone.token_ids


def test_a_fork_goes_deeper_and_outlives_its_parent(llm: ExL2LLM) -> None:
    with llm.fork_point(DOCUMENT) as point:
        deeper = point.fork(QUESTIONS[1])
    with deeper:
        assert deeper.token_ids[: point.n_tokens] == point.token_ids
        found = deeper.generate(" Well,", GREEDY)
    assert found.token_ids == expected(llm, DOCUMENT, QUESTIONS[1] + " Well,")


def test_each_continuation_may_have_a_constraint_of_its_own(llm: ExL2LLM) -> None:
    constraints = [Choice(["yes", "no"]), None, Choice(["red", "green"])]
    results = llm.generate_many(DOCUMENT, QUESTIONS[:3], GREEDY, constraints=constraints)
    assert results[0].text in ("yes", "no")
    assert results[2].text in ("red", "green")
    assert results[1].token_ids == expected(llm, DOCUMENT, QUESTIONS[1])


async def test_the_async_face_gives_the_same(llm: ExL2LLM) -> None:
    with llm.fork_point(DOCUMENT) as point:
        results = await point.agenerate(QUESTIONS[:2], GREEDY)
        pieces = [piece async for piece in point.astream(QUESTIONS[0], GREEDY)]
    assert isinstance(results, list)
    assert [one.token_ids for one in results] == [expected(llm, DOCUMENT, question) for question in QUESTIONS[:2]]
    assert tuple(token for piece in pieces for token in piece.token_ids) == results[0].token_ids


def test_a_cache_too_small_for_all_preempts_and_gives_the_same(model_dir: Path, llm: ExL2LLM) -> None:
    n_document = len(llm.tokenizer.encode(DOCUMENT, add_bos=llm.tokenizer.adds_bos))
    longer = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    with ExL2LLM(model_dir, cache_tokens=n_document + 180, page_size=16, max_batch_size=8) as small:
        results = small.generate_many(DOCUMENT, QUESTIONS, longer)
        assert small.cache_report().preemptions > 0
    assert [one.token_ids for one in results] == [
        one.token_ids for one in llm.generate_many(DOCUMENT, QUESTIONS, longer, cache_salt="another")
    ]


def test_the_tenant_of_a_fork_point_is_that_of_its_continuations(llm: ExL2LLM) -> None:
    with llm.fork_point(DOCUMENT, cache_salt="tenant") as point:
        n_tokens = point.n_tokens
        assert point.generate(QUESTIONS[0], GREEDY).usage.cached_tokens >= n_tokens
        with pytest.raises(RequestError, match="cache_salt is a matter of the whole prompt"):
            point.generate(QUESTIONS[0], GREEDY, cache_salt="other")
        with pytest.raises(RequestError, match="overflow would shorten"):
            point.generate(QUESTIONS[0], GREEDY, overflow="truncate-middle")


def test_constraints_that_do_not_fit_the_continuations_are_refused(llm: ExL2LLM) -> None:
    with llm.fork_point(DOCUMENT) as point:
        with pytest.raises(RequestError, match="one constraint for each of the 2 continuations, got 1"):
            point.generate(QUESTIONS[:2], GREEDY, constraints=[None])
        with pytest.raises(RequestError, match="not both"):
            point.generate(QUESTIONS[:1], GREEDY, constraints=[None], constraint=Choice(["a"]))
        with pytest.raises(ConstraintError):
            point.generate(QUESTIONS[:1], GREEDY, constraints=[Choice([])])
        with pytest.raises(RequestError):
            point.generate([], GREEDY)
    assert llm.cache_report().pinned_pages == 0


def test_requests_of_different_kinds_run_as_one_batch(llm: ExL2LLM) -> None:
    prompts = [tuple(llm.tokenizer.encode(text)) for text in QUESTIONS[:3]]
    requests = [
        GenerationRequest(prompts[0], GREEDY),
        GenerationRequest(prompts[1], SamplingParams(max_tokens=3, temperature=0), Choice(["yes"]), priority=2),
        GenerationRequest(prompts[2], SamplingParams(max_tokens=4, seed=1, n=2)),
    ]
    first, second, third = llm.generate_requests(requests)
    assert first.token_ids == llm.generate(list(prompts[0]), GREEDY).token_ids
    assert second.text == "yes"
    assert len(third.choices) == 2

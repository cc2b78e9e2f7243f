"""Prompts that are too long: refused, or shortened in whole turns where the caller says so; never in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.errors import ContextOverflowError, RequestError
from exl2_rag.llm.overflow import droppable_turns, fit_chat, fit_prompt, reserved_tokens
from tests.support.byte_tokenizer import BOS_ID
from tests.support.synthetic import make_model_dir

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"


def chat(*roles: str, length: int = 10) -> list[dict[str, Any]]:
    return [{"role": role, "content": chr(97 + n) * length} for n, role in enumerate(roles)]


def encode(messages: list[Mapping[str, Any]]) -> list[int]:
    """A template of two tokens a message, and one behind the last."""
    return [token for one in messages for token in (1, *map(ord, one["content"]), 2)] + [3]


def test_turns_are_a_users_message_and_what_follows_it() -> None:
    messages = chat(SYSTEM, ASSISTANT, USER, ASSISTANT, TOOL, TOOL, ASSISTANT, SYSTEM, USER, ASSISTANT, USER, ASSISTANT)
    assert droppable_turns(messages) == [[1], [2, 3, 4, 5, 6], [8, 9]]
    assert droppable_turns(chat(SYSTEM, USER, ASSISTANT, TOOL)) == []
    assert droppable_turns(chat("developer", USER, USER)) == [[1]]


@given(
    roles=st.lists(st.sampled_from([SYSTEM, USER, ASSISTANT, TOOL]), min_size=1, max_size=12),
    limit=st.integers(2, 200),
    reserve=st.integers(1, 60),
)
def test_as_few_of_the_oldest_turns_as_needed_are_left_out(roles: list[str], limit: int, reserve: int) -> None:
    messages = chat(*roles)
    turns = droppable_turns(messages)
    options: list[tuple[int, ...]] = [
        tuple(sorted(place for turn in turns[:n] for place in turn)) for n in range(len(turns) + 1)
    ]

    def length(dropped: tuple[int, ...]) -> int:
        return len(encode([one for place, one in enumerate(messages) if place not in dropped]))

    fitting = [dropped for dropped in options if length(dropped) + reserve <= limit]
    expected = fitting[0] if fitting else options[-1]
    ask: dict[str, Any] = {"policy": "truncate-oldest-turns", "limit": limit, "reserve": reserve}
    if length(expected) + 1 > limit:
        with pytest.raises(ContextOverflowError, match="system messages and the last turn") as caught:
            fit_chat(messages, encode, **ask)
        assert caught.value.prompt_tokens == length(expected)
        return
    fitted = fit_chat(messages, encode, **ask)
    assert fitted.dropped == expected
    assert list(fitted.token_ids) == encode([m for place, m in enumerate(messages) if place not in expected])
    assert not {messages[place]["role"] for place in fitted.dropped} & {SYSTEM}


def test_a_plain_prompt_loses_its_beginning_and_keeps_its_bos() -> None:
    ids = (9, *range(20, 30))
    ask: dict[str, Any] = {"policy": "truncate-left", "limit": 10}
    assert fit_prompt(ids, reserve=4, bos=9, **ask) == ((9, 25, 26, 27, 28, 29), 5)
    assert fit_prompt(ids, reserve=4, bos=None, **ask) == ((24, 25, 26, 27, 28, 29), 5)
    assert fit_prompt(ids, reserve=9, bos=9, **ask) == ((29,), 10)
    assert fit_prompt(ids[:6], reserve=4, bos=9, **ask) == (ids[:6], 0)
    assert fit_prompt(ids, policy="error", limit=5, reserve=4, bos=9) == (ids, 0)


def test_the_room_kept_free_is_that_of_max_tokens_or_a_quarter() -> None:
    assert reserved_tokens(30, 100) == 30
    assert reserved_tokens(None, 100) == 25
    assert reserved_tokens(300, 100) == 99


# --- through the public face -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExL2LLM]:
    make_model_dir(path := tmp_path_factory.mktemp("model"))
    with ExL2LLM(path, max_seq_len=128, cache_tokens=1024, page_size=16) as one:
        yield one


GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
LONG = chat(SYSTEM, USER, ASSISTANT, USER, ASSISTANT, TOOL, ASSISTANT, USER, length=15)


def test_a_long_chat_is_an_error_unless_turns_may_be_left_out(llm: ExL2LLM) -> None:
    with pytest.raises(ContextOverflowError, match="overflow"):
        llm.chat(LONG, GREEDY)
    result = llm.chat(LONG, GREEDY, overflow="truncate-oldest-turns")
    kept = [one for place, one in enumerate(LONG) if place not in result.dropped_messages]
    assert result.dropped_messages in ((1, 2), (1, 2, 3, 4, 5, 6))
    assert result.token_ids == llm.chat(kept, GREEDY).token_ids
    assert result.usage.completion_tokens == 16
    assert not result.prompt.context_full
    assert llm.chat(kept, GREEDY, overflow="truncate-oldest-turns").dropped_messages == ()
    last = list(llm.stream_chat(LONG, GREEDY, overflow="truncate-oldest-turns"))[-1]
    assert last.prompt is not None
    assert last.prompt.dropped_messages == result.dropped_messages


async def test_the_async_twins_shorten_alike(llm: ExL2LLM) -> None:
    sync = llm.chat(LONG, GREEDY, overflow="truncate-oldest-turns")
    result = await llm.achat(LONG, GREEDY, overflow="truncate-oldest-turns")
    assert (result.token_ids, result.dropped_messages) == (sync.token_ids, sync.dropped_messages)
    pieces = [piece async for piece in llm.astream_chat(LONG, GREEDY, overflow="truncate-oldest-turns")]
    assert pieces[-1].prompt is not None
    assert pieces[-1].prompt.dropped_messages == sync.dropped_messages


def test_a_last_turn_that_is_too_long_is_an_error_whatever_the_policy(llm: ExL2LLM) -> None:
    with pytest.raises(ContextOverflowError, match="last turn"):
        llm.chat(chat(SYSTEM, USER, USER, length=200), GREEDY, overflow="truncate-oldest-turns")


def test_a_long_plain_prompt_is_an_error_unless_its_beginning_may_be_left_out(llm: ExL2LLM) -> None:
    text = "".join(chr(97 + n % 26) for n in range(300))
    with pytest.raises(ContextOverflowError):
        llm.generate(text, GREEDY)
    result = llm.generate(text, GREEDY, overflow="truncate-left")
    assert result.prompt.dropped_tokens == 301 + 16 - 128
    assert result.usage.prompt_tokens == 112
    assert result.token_ids == llm.generate([BOS_ID, *text.encode()[-111:]], GREEDY).token_ids


def test_a_policy_of_the_other_kind_of_prompt_is_refused(llm: ExL2LLM) -> None:
    with pytest.raises(
        RequestError, match="a chat must be one of 'error', 'truncate-oldest-turns', got 'truncate-left'"
    ):
        llm.chat(LONG, GREEDY, overflow="truncate-left")
    with pytest.raises(RequestError, match="a plain prompt must be one of"):
        llm.generate("x", GREEDY, overflow="truncate-oldest-turns")
    with pytest.raises(RequestError, match="got 'drop'"):
        llm.generate("x", GREEDY, overflow="drop")  # type: ignore[arg-type]


def test_a_text_that_the_context_ends_says_so(llm: ExL2LLM) -> None:
    prompt = [BOS_ID, *range(97, 122)]
    sampling = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    result = llm.generate(prompt, sampling)
    assert (result.finish_reason, result.usage.total_tokens) == ("length", 128)
    assert result.prompt.context_full
    assert llm.generate(prompt, SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)).prompt.context_full
    exact = llm.generate(prompt, SamplingParams(max_tokens=128 - 26, temperature=0, ignore_eos=True))
    assert exact.usage.total_tokens == 128
    assert not exact.prompt.context_full


# --- log-probabilities of the prompt, beside a continuation ----------------------------------------------------------


def test_prompt_logprobs_come_beside_the_text_and_change_nothing_of_it(llm: ExL2LLM) -> None:
    prompts = [[BOS_ID, *range(97, 97 + n)] for n in (3, 20, 12)]
    plain = llm.generate(prompts, GREEDY)
    assert all(one.prompt_logprobs is None for one in plain)
    found = llm.generate(prompts, GREEDY, prompt_logprobs=2)
    for prompt, before, result in zip(prompts, plain, found, strict=True):
        assert result.token_ids == before.token_ids
        assert result.usage.cached_tokens == 0, "rows that are asked for are computed anew"
        assert result.prompt_logprobs == llm.prompt_logprobs(prompt, top=2)
    last = list(llm.stream(prompts[0], GREEDY, prompt_logprobs=0))[-1]
    assert last.prompt is not None
    assert last.prompt.logprobs == llm.prompt_logprobs(prompts[0])


def test_prompt_logprobs_survive_a_tiny_cache_and_several_choices(llm: ExL2LLM) -> None:
    prompts = [[BOS_ID, *range(97, 117 + n)] for n in range(4)]
    expected = [llm.prompt_logprobs(one, top=1) for one in prompts]
    with ExL2LLM(llm.model_dir, max_seq_len=128, cache_tokens=96, page_size=16, max_batch_size=4) as tiny:
        found = tiny.generate(prompts, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True), prompt_logprobs=1)
        assert tiny.cache_report().preemptions > 0
    assert [one.prompt_logprobs for one in found] == expected
    several = llm.generate(prompts[0], SamplingParams(max_tokens=4, n=3, seed=1), prompt_logprobs=1)
    assert several.prompt_logprobs == expected[0]
    assert [one.prompt_logprobs for one in several.alternatives] == [None, None]


def test_more_than_a_hundred_likely_tokens_are_refused(llm: ExL2LLM) -> None:
    with pytest.raises(RequestError, match="prompt_logprobs must be from 0 to 100"):
        llm.generate("x", GREEDY, prompt_logprobs=101)

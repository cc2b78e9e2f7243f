"""Tenants: requests of different salts never share pages, those of one salt do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.errors import RequestError
from tests.support.synthetic import make_model_dir

GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
PROMPT = list(range(32, 122)) * 2


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def llm(model_dir: Path) -> Iterator[ExL2LLM]:
    with ExL2LLM(model_dir, cache_tokens=4096) as one:
        yield one


def test_two_salts_never_hit_and_one_salt_does(llm: ExL2LLM) -> None:
    first = llm.generate(PROMPT, GREEDY, cache_salt="alice")
    for salt in ("bob", None, "Alice", "alice "):
        assert llm.generate(PROMPT, GREEDY, cache_salt=salt).usage.cached_tokens == 0
    again = llm.generate(PROMPT, GREEDY, cache_salt="alice")
    assert again.usage.cached_tokens == len(PROMPT) - 1
    assert again.token_ids == first.token_ids
    assert llm.generate(PROMPT, GREEDY).usage.cached_tokens == len(PROMPT) - 1


def test_what_is_warmed_for_one_tenant_is_cold_for_another(llm: ExL2LLM) -> None:
    llm.warm(PROMPT, cache_salt="alice")
    assert llm.warm(PROMPT, cache_salt="bob").cached_tokens == 0
    with llm.pin(PROMPT, cache_salt="carol"):
        assert llm.generate(PROMPT, GREEDY, cache_salt="dave").usage.cached_tokens == 0
        assert llm.generate(PROMPT, GREEDY, cache_salt="carol").usage.cached_tokens == len(PROMPT) - 1


def test_salts_keep_apart_in_one_batch_and_while_a_prefix_is_being_computed(llm: ExL2LLM) -> None:
    salts = ["a", "b", "c", "a", "b", "c"]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda salt: llm.generate(PROMPT, GREEDY, cache_salt=salt), salts))
    assert sorted(one.usage.cached_tokens for one in results) == [0, 0, 0] + [len(PROMPT) - 1] * 3
    assert len({one.token_ids for one in results}) == 1


def test_chat_and_stream_take_a_salt(llm: ExL2LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France, and what of Spain?"}]
    for salt in ("a", "b"):
        assert llm.chat(messages, GREEDY, cache_salt=salt).usage.cached_tokens == 0
        last = list(llm.stream_chat(messages, GREEDY, cache_salt=salt))[-1]
        assert last.usage is not None
        assert last.usage.cached_tokens == last.usage.prompt_tokens - 1


def test_a_salt_that_is_no_text_is_refused(llm: ExL2LLM) -> None:
    with pytest.raises(RequestError, match="cache_salt"):
        llm.generate(PROMPT, GREEDY, cache_salt="")
    with pytest.raises(RequestError, match="cache_salt"):
        llm.warm(PROMPT, cache_salt="")

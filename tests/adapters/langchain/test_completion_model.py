"""LangChain's `ExL2` over a scripted engine: prompts are continued as they are, a batch at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError as LangChainContextOverflowError
from pydantic import ValidationError

from exl2_rag.adapters.langchain import ExL2
from exl2_rag.errors import ContextOverflowError, SettingsError
from tests.adapters.fake_engine import FakeEngine


class Tokens(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)


def test_invoke_continues_the_prompt_without_echo(fake: FakeEngine) -> None:
    assert ExL2(llm=fake).invoke("Once") == "Hello, world"
    assert fake.asked[0].prompt == ["Once"]


def test_a_batch_is_one_call_of_the_engine(fake: FakeEngine) -> None:
    assert ExL2(llm=fake).batch(["a", "b", "c"]) == ["Hello, world"] * 3
    assert [asked.prompt for asked in fake.asked] == [["a", "b", "c"]]


async def test_an_async_batch_is_one_call_too(fake: FakeEngine) -> None:
    assert await ExL2(llm=fake).abatch(["a", "b", "c"]) == ["Hello, world"] * 3
    assert [(asked.method, asked.prompt) for asked in fake.asked] == [("agenerate", ["a", "b", "c"])]


async def test_cancelling_an_async_batch_frees_all_its_requests(fake: FakeEngine) -> None:
    fake.delay_s = 60
    batch = asyncio.create_task(ExL2(llm=fake).abatch(["a", "b"]))
    await asyncio.sleep(0.03)
    assert fake.active_requests == 2
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    await asyncio.sleep(0)
    assert fake.active_requests == 0


def test_results_tell_finish_reason_and_tokens(fake: FakeEngine) -> None:
    fake.finish_reason = "length"
    result = ExL2(llm=fake).generate(["abcd", "ef"])
    info = result.generations[0][0].generation_info
    assert info is not None
    assert info["finish_reason"] == "length"
    assert info["usage"]["prompt_tokens"] == 4
    assert result.llm_output is not None


def test_the_batch_counts_its_tokens_together(fake: FakeEngine) -> None:
    output = ExL2(llm=fake)._generate(["abcd", "ef"]).llm_output
    assert output == {
        "model_name": "fake-model",
        "token_usage": {
            "prompt_tokens": 6,
            "completion_tokens": 6,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 5},
        },
    }


async def test_streams_come_in_pieces_and_reach_callbacks(fake: FakeEngine) -> None:
    seen, aseen = Tokens(), Tokens()
    pieces = list(ExL2(llm=fake).stream("Once", config={"callbacks": [seen]}))
    apieces = [piece async for piece in ExL2(llm=fake).astream("Once", config={"callbacks": [aseen]})]
    assert pieces == apieces == ["Hello", ", ", "world", ""]
    assert seen.tokens == aseen.tokens == ["Hello", ", ", "world", ""]


def test_the_last_chunk_has_the_finish_reason(fake: FakeEngine) -> None:
    chunks = list(ExL2(llm=fake)._stream("Once"))
    assert [chunk.generation_info is None for chunk in chunks] == [True, True, True, False]
    assert chunks[-1].generation_info is not None
    assert chunks[-1].generation_info["finish_reason"] == "stop"


async def test_leaving_a_stream_frees_the_request(fake: FakeEngine) -> None:
    stream, astream = ExL2(llm=fake).stream("Once"), ExL2(llm=fake).astream("Once")
    next(stream)
    await anext(astream)
    assert fake.active_requests == 2
    stream.close()  # type: ignore[attr-defined]
    await astream.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0.01)
    assert fake.active_requests == 0


def test_options_of_a_call_win_and_do_not_stick(fake: FakeEngine) -> None:
    model = ExL2(llm=fake, temperature=0.1, stop=["x"])
    model.invoke("a", temperature=0.5, stop=["y"])
    model.invoke("a")
    assert [asked.sampling.temperature for asked in fake.asked] == [0.5, 0.1]
    assert [asked.sampling.stop for asked in fake.asked] == [("y",), ("x",)]


def test_unknown_keywords_are_errors(fake: FakeEngine) -> None:
    with pytest.raises(ValidationError, match="temprature"):
        ExL2(llm=fake, temprature=0)  # type: ignore[call-arg]
    with pytest.raises(SettingsError, match="unknown option best_of"):
        ExL2(llm=fake).invoke("a", best_of=3)


def test_an_over_long_prompt_is_langchains_error_and_ours(fake: FakeEngine) -> None:
    fake.max_seq_len = 2
    with pytest.raises(LangChainContextOverflowError):
        list(ExL2(llm=fake).stream("Once"))
    with pytest.raises(ContextOverflowError):
        list(ExL2(llm=fake).stream("Once"))


def test_identity_and_tracing(fake: FakeEngine) -> None:
    model = ExL2(llm=fake, temperature=0.2, stop=["x"])
    assert model._llm_type == "exl2"
    assert model._identifying_params["default_stop"] == ["x"]
    assert model._identifying_params["temperature"] == 0.2
    assert model._get_ls_params()["ls_model_name"] == "fake-model"
    assert model._get_ls_params()["ls_provider"] == "exl2-rag"
    assert model.get_num_tokens("abcd") == 4

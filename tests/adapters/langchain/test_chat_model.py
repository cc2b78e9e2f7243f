"""`ChatExL2` over a scripted engine: every way in and out of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.exceptions import ContextOverflowError as LangChainContextOverflowError
from langchain_core.load import dumpd
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from pydantic import ValidationError

from exl2_rag.adapters.langchain import ChatExL2
from exl2_rag.errors import ContextOverflowError, ModelNotFoundError, RequestError, SettingsError
from tests.adapters.fake_engine import FakeEngine


def merged(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.ends = 0
        self.errors: list[BaseException] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.ends += 1

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)


# Answers


def test_invoke_returns_text_usage_and_metadata(fake: FakeEngine) -> None:
    answer = ChatExL2(llm=fake).invoke([SystemMessage("Be brief."), HumanMessage("Hi")])
    assert answer.content == "Hello, world"
    assert answer.usage_metadata == {
        "input_tokens": len("<system>Be brief.<user>Hi"),
        "output_tokens": 3,
        "total_tokens": len("<system>Be brief.<user>Hi") + 3,
        "input_token_details": {"cache_read": 3},
    }
    assert answer.response_metadata == {"finish_reason": "stop", "model_name": "fake-model"}
    assert [asked.method for asked in fake.asked] == ["chat"]


def test_stream_comes_in_pieces_and_adds_up_to_the_invoked_message(fake: FakeEngine) -> None:
    model = ChatExL2(llm=fake)
    chunks = list(model.stream("Hi"))
    assert [chunk.content for chunk in chunks] == ["Hello", ", ", "world", ""]
    assert [chunk.chunk_position for chunk in chunks] == [None, None, None, "last"]
    assert [chunk.usage_metadata is None for chunk in chunks] == [True, True, True, False]
    whole, invoked = merged(chunks), model.invoke("Hi")
    assert whole.content == invoked.content
    assert whole.usage_metadata == invoked.usage_metadata
    assert whole.response_metadata == invoked.response_metadata


async def test_ainvoke_and_astream_use_the_engines_own_async(fake: FakeEngine) -> None:
    model = ChatExL2(llm=fake)
    answer = await model.ainvoke("Hi")
    chunks = [chunk async for chunk in model.astream("Hi")]
    assert merged(chunks).content == answer.content == "Hello, world"
    assert [asked.method for asked in fake.asked] == ["achat", "astream_chat"]


async def test_an_async_answer_leaves_the_event_loop_free(fake: FakeEngine) -> None:
    fake.delay_s = 0.2
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    await ChatExL2(llm=fake).ainvoke("Hi")
    ticking.cancel()
    assert ticks >= 5


def test_batch_sends_one_request_for_each_prompt(fake: FakeEngine) -> None:
    answers = ChatExL2(llm=fake).batch(["a", "b", "c"])
    assert [answer.content for answer in answers] == ["Hello, world"] * 3
    assert len(fake.asked) == 3


async def test_abatch_runs_its_prompts_at_the_same_time(fake: FakeEngine) -> None:
    fake.delay_s = 0.05
    model = ChatExL2(llm=fake)
    batch = asyncio.create_task(model.abatch(["a", "b", "c"]))
    await asyncio.sleep(0.03)
    assert fake.active_requests == 3
    assert len(await batch) == 3
    assert fake.active_requests == 0


def test_a_cut_off_answer_says_so_also_in_a_stream(fake: FakeEngine) -> None:
    fake.finish_reason = "length"
    model = ChatExL2(llm=fake)
    assert model.invoke("Hi").response_metadata["finish_reason"] == "length"
    assert merged(list(model.stream("Hi"))).response_metadata["finish_reason"] == "length"


# Leaving early


def test_leaving_a_stream_frees_the_request(fake: FakeEngine) -> None:
    stream = ChatExL2(llm=fake).stream("Hi")
    next(stream)
    assert fake.active_requests == 1
    assert isinstance(stream, Iterator)
    stream.close()  # type: ignore[attr-defined]
    assert fake.active_requests == 0


async def test_a_handler_that_keeps_the_exception_does_not_keep_the_request(fake: FakeEngine) -> None:
    recorder = Recorder()
    model = ChatExL2(llm=fake, callbacks=[recorder])
    stream = model.stream("Hi")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    astream = model.astream("Hi")
    await anext(astream)
    await astream.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0.01)
    assert len(recorder.errors) == 2
    assert fake.active_requests == 0


async def test_closing_an_async_stream_frees_the_request(fake: FakeEngine) -> None:
    stream = ChatExL2(llm=fake).astream("Hi")
    await anext(stream)
    assert fake.active_requests == 1
    await stream.aclose()  # type: ignore[attr-defined]
    assert fake.active_requests == 0


async def test_cancelling_an_invoke_frees_the_request(fake: FakeEngine) -> None:
    fake.delay_s = 60
    task = asyncio.create_task(ChatExL2(llm=fake).ainvoke("Hi"))
    await asyncio.sleep(0.02)
    assert fake.active_requests == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fake.active_requests == 0


async def test_leaving_a_chain_frees_the_request(fake: FakeEngine) -> None:
    chain = ChatPromptTemplate.from_messages([("user", "{q}")]) | ChatExL2(llm=fake) | StrOutputParser()
    stream = chain.astream({"q": "Hi"})
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0.01)  # LangChain leaves the inner generators to the event loop's next turn
    assert fake.active_requests == 0


async def test_leaving_the_event_stream_frees_the_request(fake: FakeEngine) -> None:
    fake.pieces = ["x"] * 200
    fake.delay_s = 0.01
    events = ChatExL2(llm=fake).astream_events("Hi", version="v2")
    async for event in events:
        if event["event"] == "on_chat_model_stream":
            break
    await events.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0.05)
    assert fake.active_requests == 0


# Options


def test_options_of_the_constructor_reach_the_engine(fake: FakeEngine) -> None:
    ChatExL2(llm=fake, temperature=0.1, max_tokens=7, top_k=5, top_p=0.9, min_p=0.05, seed=3, stop=["x"]).invoke("Hi")
    sampling = fake.asked[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.stop) == (0.1, 7, ("x",))
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed) == (5, 0.9, 0.05, 3)


def test_options_of_a_call_win_and_do_not_stick(fake: FakeEngine) -> None:
    model = ChatExL2(llm=fake, temperature=0.1, max_tokens=7, stop=["x"])
    model.invoke("Hi", temperature=0.5, max_tokens=9, stop=["y"])
    model.invoke("Hi")
    first, second = (asked.sampling for asked in fake.asked)
    assert (first.temperature, first.max_tokens, first.stop) == (0.5, 9, ("y",))
    assert (second.temperature, second.max_tokens, second.stop) == (0.1, 7, ("x",))


def test_an_empty_stop_of_a_call_switches_the_default_off(fake: FakeEngine) -> None:
    ChatExL2(llm=fake, stop=["x"]).invoke("Hi", stop=[])
    assert fake.asked[0].sampling.stop == ()


@pytest.mark.parametrize("method", ["invoke", "stream"])
def test_a_constraint_reaches_the_engine(fake: FakeEngine, method: str) -> None:
    constraint = object()
    list(getattr(ChatExL2(llm=fake).bind(constraint=constraint), method)("Hi"))
    assert fake.asked[0].constraint is constraint


def test_an_unknown_keyword_of_the_constructor_is_an_error(fake: FakeEngine) -> None:
    with pytest.raises(ValidationError, match="temprature"):
        ChatExL2(llm=fake, temprature=0)  # type: ignore[call-arg]


def test_an_unknown_option_of_a_call_is_an_error(fake: FakeEngine) -> None:
    with pytest.raises(SettingsError, match="unknown option best_of=2"):
        ChatExL2(llm=fake).invoke("Hi", best_of=2)
    with pytest.raises(ValueError, match="unknown option 'presence'"):
        ChatExL2(llm=fake, sampling={"presence": 1})


def test_every_sampler_can_be_set_once_or_for_a_call(fake: FakeEngine) -> None:
    model = ChatExL2(llm=fake, sampling={"repetition_penalty": 1.2, "dry_multiplier": 0.8})
    model.invoke("Hi")
    model.invoke("Hi", dry_multiplier=0.0, frequency_penalty=0.5)
    first, second = (one.sampling for one in fake.asked)
    assert (first.repetition_penalty, first.dry_multiplier, first.frequency_penalty) == (1.2, 0.8, 0.0)
    assert (second.repetition_penalty, second.dry_multiplier, second.frequency_penalty) == (1.2, 0.0, 0.5)
    assert model._identifying_params != ChatExL2(llm=fake)._identifying_params
    with pytest.raises(ValueError, match="repetition_penalty must be"):
        ChatExL2(llm=fake, sampling={"repetition_penalty": 0})


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("max_tokens", 0), ("top_p", 0)])
def test_a_value_out_of_range_is_an_error_at_once(fake: FakeEngine, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        ChatExL2(llm=fake, **{name: value})
    with pytest.raises(RequestError, match=name):
        ChatExL2(llm=fake).invoke("Hi", **{name: value})


def test_one_of_handle_and_directory_must_be_given(fake: FakeEngine) -> None:
    with pytest.raises(ValueError, match="got neither"):
        ChatExL2()
    with pytest.raises(ValueError, match="got both"):
        ChatExL2(llm=fake, model_dir="models/x")


def test_a_handle_of_the_wrong_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"got str.*model_dir="):
        ChatExL2(llm="models/x")


def test_a_bad_model_directory_raises_at_once_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        ChatExL2(model_dir=tmp_path / "no-such-model")


def test_options_can_be_made_configurable(fake: FakeEngine) -> None:
    model = ChatExL2(llm=fake).configurable_fields(temperature=ConfigurableField(id="heat"))
    model.invoke("Hi", config={"configurable": {"heat": 0.25}})
    assert fake.asked[0].sampling.temperature == 0.25


@pytest.mark.parametrize("option", ["tools", "response_format"])
def test_options_of_later_features_are_refused(fake: FakeEngine, option: str) -> None:
    with pytest.raises(SettingsError, match="not supported by this adapter yet"):
        ChatExL2(llm=fake).invoke("Hi", **{option: [{"x": 1}]})


def test_tools_and_structured_output_are_refused_by_name(fake: FakeEngine) -> None:
    model = ChatExL2(llm=fake)
    with pytest.raises(SettingsError, match="tool calling is not supported"):
        model.bind_tools([])
    with pytest.raises(SettingsError, match="structured output is not supported"):
        model.with_structured_output({"title": "x", "type": "object"})
    with pytest.raises(SettingsError, match="tool calling"):
        model.get_num_tokens_from_messages([HumanMessage("Hi")], tools=[{"name": "x"}])


# Over-long prompts


@pytest.mark.parametrize("kind", [ContextOverflowError, LangChainContextOverflowError])
def test_an_over_long_prompt_is_langchains_error_and_ours(fake: FakeEngine, kind: type[Exception]) -> None:
    fake.max_seq_len = 10
    with pytest.raises(kind, match="15 tokens, the limit is 10") as caught:
        ChatExL2(llm=fake).invoke("too long.")
    assert caught.value.prompt_tokens == 15  # type: ignore[attr-defined]
    assert caught.value.limit_tokens == 10  # type: ignore[attr-defined]


async def test_an_over_long_prompt_is_the_same_error_on_every_way(fake: FakeEngine) -> None:
    fake.max_seq_len = 10
    model = ChatExL2(llm=fake)
    with pytest.raises(LangChainContextOverflowError):
        list(model.stream("too long."))
    with pytest.raises(LangChainContextOverflowError):
        await model.ainvoke("too long.")
    with pytest.raises(LangChainContextOverflowError):
        _ = [chunk async for chunk in model.astream("too long.")]
    assert fake.active_requests == 0


# Callbacks, tracing, caching


def test_callbacks_see_every_token_of_a_stream(fake: FakeEngine) -> None:
    recorder = Recorder()
    list(ChatExL2(llm=fake).stream("Hi", config={"callbacks": [recorder]}))
    assert recorder.tokens == ["Hello", ", ", "world", ""]
    assert recorder.ends == 1


async def test_callbacks_see_every_token_of_an_async_stream(fake: FakeEngine) -> None:
    recorder = Recorder()
    stream: AsyncIterator[Any] = ChatExL2(llm=fake).astream("Hi", config={"callbacks": [recorder]})
    assert len([chunk async for chunk in stream]) == 4
    assert "".join(recorder.tokens) == "Hello, world"


def test_callbacks_see_an_error(fake: FakeEngine) -> None:
    fake.max_seq_len = 1
    recorder = Recorder()
    with pytest.raises(ContextOverflowError):
        ChatExL2(llm=fake).invoke("Hi", config={"callbacks": [recorder]})
    assert len(recorder.errors) == 1


def test_streaming_true_sends_tokens_of_an_invoke_to_callbacks(fake: FakeEngine) -> None:
    recorder = Recorder()
    answer = ChatExL2(llm=fake, streaming=True).invoke("Hi", config={"callbacks": [recorder]})
    assert "".join(recorder.tokens) == answer.content == "Hello, world"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 3


def test_the_usage_callback_counts_by_model(fake: FakeEngine) -> None:
    usage = UsageMetadataCallbackHandler()
    model = ChatExL2(llm=fake)
    model.invoke("Hi", config={"callbacks": [usage]})
    list(model.stream("Hi", config={"callbacks": [usage]}))
    assert usage.usage_metadata["fake-model"]["output_tokens"] == 6


def test_models_that_differ_in_stop_do_not_share_cached_answers(fake: FakeEngine) -> None:
    cache = InMemoryCache()
    ChatExL2(llm=fake, stop=["x"], cache=cache).invoke("Hi")
    ChatExL2(llm=fake, stop=["x"], cache=cache).invoke("Hi")
    assert len(fake.asked) == 1
    ChatExL2(llm=fake, stop=["y"], cache=cache).invoke("Hi")
    assert len(fake.asked) == 2


def test_tracing_names_provider_and_model(fake: FakeEngine) -> None:
    params = ChatExL2(llm=fake, temperature=0.5, max_tokens=9, stop=["x"])._get_ls_params()
    assert params == {
        "ls_provider": "exl2-rag",
        "ls_model_name": "fake-model",
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 9,
        "ls_stop": ["x"],
    }
    assert ChatExL2(llm=fake)._get_ls_params(model="other")["ls_model_name"] == "other"


def test_serialising_keeps_the_engine_and_the_key_out(fake: FakeEngine) -> None:
    model = ChatExL2(llm=fake, api_key="secret-key")  # type: ignore[arg-type]
    assert "llm" not in model.model_dump()
    assert "FakeEngine" not in str(dumpd(model))
    assert "secret-key" not in str(dumpd(model)) + repr(model)


def test_the_profile_tells_what_the_model_takes(fake: FakeEngine) -> None:
    profile = ChatExL2(llm=fake).profile
    assert profile is not None
    assert profile["max_input_tokens"] == 4000
    assert profile["tool_calling"] is False
    assert profile["structured_output"] is False


def test_tokens_are_counted_by_the_models_own_tokenizer(fake: FakeEngine) -> None:
    model = ChatExL2(llm=fake)
    messages = [HumanMessage("Hi")]
    answer = model.invoke(messages)
    assert answer.usage_metadata is not None
    assert model.get_num_tokens("abcd") == 4
    assert model.get_num_tokens_from_messages(messages) == answer.usage_metadata["input_tokens"]

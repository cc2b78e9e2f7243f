"""LlamaIndex's `ExL2` over a scripted engine: every way in and out of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, ValidationError

from exl2_rag.adapters.llama_index import ExL2
from exl2_rag.errors import ContextOverflowError, RequestError, SettingsError
from tests.adapters.fake_engine import FakeEngine

HI = [ChatMessage(role="user", content="Hi")]
USAGE = {
    "prompt_tokens": 8,
    "completion_tokens": 3,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 3},
}


# Answers


def test_chat_returns_text_and_usage(fake: FakeEngine) -> None:
    response = ExL2(llm=fake).chat(HI)
    assert response.message.role == MessageRole.ASSISTANT
    assert response.message.content == "Hello, world"
    assert response.raw == {"usage": USAGE, "finish_reason": "stop", "model": "fake-model"}


def test_stream_parts_hold_the_new_text_and_all_text_so_far(fake: FakeEngine) -> None:
    parts = list(ExL2(llm=fake).stream_chat(HI))
    assert [part.delta for part in parts] == ["Hello", ", ", "world", ""]
    assert [part.message.content for part in parts] == ["Hello", "Hello, ", "Hello, world", "Hello, world"]
    assert [part.raw is None for part in parts] == [True, True, True, False]
    assert parts[-1].raw["usage"] == USAGE


async def test_async_chat_uses_the_engines_own_async(fake: FakeEngine) -> None:
    model = ExL2(llm=fake)
    response = await model.achat(HI)
    parts = [part async for part in await model.astream_chat(HI)]
    assert response.message.content == parts[-1].message.content == "Hello, world"
    assert response.raw == parts[-1].raw
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
    await ExL2(llm=fake).achat(HI)
    ticking.cancel()
    assert ticks >= 5


def test_complete_sends_a_user_message_through_the_chat_template(fake: FakeEngine) -> None:
    response = ExL2(llm=fake).complete("Hi")
    assert response.text == "Hello, world"
    assert response.raw["usage"] == USAGE
    assert fake.asked[0].method == "chat"
    assert fake.asked[0].prompt == [{"role": "user", "content": "Hi"}]


async def test_a_formatted_prompt_is_continued_as_it_is_on_every_way(fake: FakeEngine) -> None:
    model = ExL2(llm=fake)
    texts = [model.complete("Hi", formatted=True).text, (await model.acomplete("Hi", formatted=True)).text]
    texts.append(list(model.stream_complete("Hi", formatted=True))[-1].text)
    texts.append([part async for part in await model.astream_complete("Hi", formatted=True)][-1].text)
    assert texts == ["Hello, world"] * 4
    assert [asked.method for asked in fake.asked] == ["generate", "agenerate", "stream", "astream"]
    assert {asked.prompt for asked in fake.asked} == {"Hi"}


async def test_an_unformatted_prompt_takes_the_chat_template_on_every_way(fake: FakeEngine) -> None:
    model = ExL2(llm=fake)
    model.complete("Hi")
    await model.acomplete("Hi")
    assert [part.delta for part in model.stream_complete("Hi")] == ["Hello", ", ", "world", ""]
    assert [part.delta async for part in await model.astream_complete("Hi")] == ["Hello", ", ", "world", ""]
    assert [asked.method for asked in fake.asked] == ["chat", "achat", "stream_chat", "astream_chat"]


def test_a_completion_to_prompt_of_the_user_replaces_the_chat_template(fake: FakeEngine) -> None:
    ExL2(llm=fake, completion_to_prompt=lambda text: f"Q: {text} A:").complete("Hi")
    assert (fake.asked[0].method, fake.asked[0].prompt) == ("generate", "Q: Hi A:")


def test_a_model_without_a_chat_template_continues_the_prompt(fake: FakeEngine) -> None:
    fake.has_chat_template = False
    ExL2(llm=fake).complete("Hi")
    assert (fake.asked[0].method, fake.asked[0].prompt) == ("generate", "Hi")


def test_predict_and_system_prompt_work_through_chat(fake: FakeEngine) -> None:
    model = ExL2(llm=fake, system_prompt="Be brief.")
    assert model.predict(PromptTemplate("Say {what}"), what="hi") == "Hello, world"
    assert fake.asked[0].prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say hi"},
    ]


# Leaving early


@pytest.mark.parametrize("method", ["stream_chat", "stream_complete"])
@pytest.mark.parametrize("kept", [False, True], ids=["no handler", "a handler keeps the exception"])
def test_leaving_a_stream_frees_the_request(fake: FakeEngine, method: str, kept: bool) -> None:
    model = ExL2(llm=fake)
    if kept:
        model.callback_manager = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    stream = getattr(model, method)(HI if method == "stream_chat" else "Hi")
    next(stream)
    assert fake.active_requests == 1
    stream.close()
    assert fake.active_requests == 0


@pytest.mark.parametrize("method", ["astream_chat", "astream_complete"])
@pytest.mark.parametrize("kept", [False, True], ids=["no handler", "a handler keeps the exception"])
async def test_closing_an_async_stream_frees_the_request(fake: FakeEngine, method: str, kept: bool) -> None:
    model = ExL2(llm=fake)
    if kept:
        model.callback_manager = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    stream = await getattr(model, method)(HI if method == "astream_chat" else "Hi")
    await anext(stream)
    assert fake.active_requests == 1
    await stream.aclose()
    assert fake.active_requests == 0


async def test_cancelling_a_chat_frees_the_request(fake: FakeEngine) -> None:
    fake.delay_s = 60
    task = asyncio.create_task(ExL2(llm=fake).achat(HI))
    await asyncio.sleep(0.02)
    assert fake.active_requests == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fake.active_requests == 0


# Messages


def test_roles_carry_over(fake: FakeEngine) -> None:
    roles = ["system", "developer", "user", "assistant", "chatbot", "model"]
    ExL2(llm=fake).chat([ChatMessage(role=role, content="x") for role in roles])
    asked = [message["role"] for message in fake.asked[0].prompt]
    assert asked == ["system", "system", "user", "assistant", "assistant", "assistant"]


def test_text_blocks_are_joined_and_the_history_stays_as_it_was(fake: FakeEngine) -> None:
    history = [ChatMessage(role="user", blocks=[TextBlock(text="one"), TextBlock(text="two")])]
    before = [message.model_dump() for message in history]
    ExL2(llm=fake).chat(history)
    assert fake.asked[0].prompt == [{"role": "user", "content": "one\ntwo"}]
    assert [message.model_dump() for message in history] == before


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (ChatMessage(role="user", blocks=[ImageBlock(image=b"AAAA")]), "takes text only"),
        (ChatMessage(role="tool", content="4"), "not supported by this adapter yet"),
        (ChatMessage(role="function", content="4"), "not supported by this adapter yet"),
        (
            ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_name="add", tool_kwargs={})]),
            "not supported by this adapter yet",
        ),
        (
            ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [{"id": "1"}]}),
            "not supported by this adapter yet",
        ),
    ],
)
def test_what_cannot_be_carried_over_is_an_error(fake: FakeEngine, message: ChatMessage, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        ExL2(llm=fake).chat([message])


def test_an_empty_conversation_is_refused(fake: FakeEngine) -> None:
    with pytest.raises(SettingsError, match="at least one message"):
        ExL2(llm=fake).chat([])


# Options


def test_options_of_a_call_win_and_do_not_stick(fake: FakeEngine) -> None:
    model = ExL2(llm=fake, temperature=0.1, max_tokens=7, stop=["x"])
    options: dict[str, Any] = {"temperature": 0.5, "max_tokens": 9, "stop": ["y"]}
    model.chat(HI, **options)
    model.chat(HI)
    first, second = (asked.sampling for asked in fake.asked)
    assert (first.temperature, first.max_tokens, first.stop) == (0.5, 9, ("y",))
    assert (second.temperature, second.max_tokens, second.stop) == (0.1, 7, ("x",))
    assert options == {"temperature": 0.5, "max_tokens": 9, "stop": ["y"]}


def test_a_constraint_reaches_the_engine(fake: FakeEngine) -> None:
    constraint = object()
    ExL2(llm=fake).chat(HI, constraint=constraint)
    assert fake.asked[0].constraint is constraint


def test_unknown_keywords_are_errors(fake: FakeEngine) -> None:
    with pytest.raises(ValidationError, match="temprature"):
        ExL2(llm=fake, temprature=0)
    with pytest.raises(SettingsError, match="unknown option best_of"):
        ExL2(llm=fake).chat(HI, best_of=2)
    with pytest.raises(RequestError, match="temperature"):
        ExL2(llm=fake).chat(HI, temperature=-1)


def test_metadata_is_what_prompts_are_packed_by(fake: FakeEngine) -> None:
    metadata = ExL2(llm=fake, max_tokens=77).metadata
    assert (metadata.context_window, metadata.num_output) == (4000, 77)
    assert metadata.is_chat_model
    assert metadata.model_name == "fake-model"


def test_an_over_long_prompt_is_a_value_error_that_names_the_limit(fake: FakeEngine) -> None:
    fake.max_seq_len = 5
    with pytest.raises(ValueError, match="8 tokens, the limit is 5"):
        ExL2(llm=fake).chat(HI)
    with pytest.raises(ContextOverflowError):
        ExL2(llm=fake).stream_chat(HI)


def test_the_models_tokenizer_is_offered(fake: FakeEngine) -> None:
    assert ExL2(llm=fake).tokenizer("abcd") == [97, 98, 99, 100]


@pytest.mark.parametrize("streamed", [False, True])
def test_the_token_counting_handler_reads_our_counts(fake: FakeEngine, streamed: bool) -> None:
    model = ExL2(llm=fake)
    counter = TokenCountingHandler(tokenizer=model.tokenizer)
    model.callback_manager = CallbackManager([counter])
    if streamed:
        list(model.stream_chat(HI))
    else:
        model.chat(HI)
    assert (counter.prompt_llm_token_count, counter.completion_llm_token_count) == (8, 3)


def test_serialising_keeps_the_engine_out(fake: FakeEngine) -> None:
    model = ExL2(llm=fake, temperature=0.3)
    assert "llm" not in model.to_dict()
    assert model.to_dict()["temperature"] == 0.3
    assert "FakeEngine" not in repr(model)


# What comes later


class Answer(BaseModel):
    text: str


async def test_tools_and_structured_output_are_refused_by_name(fake: FakeEngine) -> None:
    model, prompt = ExL2(llm=fake), PromptTemplate("x")
    with pytest.raises(SettingsError, match="structured output is not supported"):
        model.structured_predict(Answer, prompt)
    with pytest.raises(SettingsError, match="structured output is not supported"):
        await model.astructured_predict(Answer, prompt)
    with pytest.raises(SettingsError, match="structured output is not supported"):
        model.stream_structured_predict(Answer, prompt)
    with pytest.raises(SettingsError, match="structured output is not supported"):
        await model.astream_structured_predict(Answer, prompt)
    with pytest.raises(SettingsError, match="structured output is not supported"):
        model.as_structured_llm(Answer)
    with pytest.raises(SettingsError, match="tool calling is not supported"):
        model.chat_with_tools([FunctionTool.from_defaults(fn=lambda: "4", name="four")], user_msg="Hi")
    with pytest.raises(SettingsError, match="tool calling is not supported"):
        model.get_tool_calls_from_response(model.chat(HI))

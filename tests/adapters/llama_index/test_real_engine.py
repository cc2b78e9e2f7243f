"""The LlamaIndex model over a real engine: a tiny EXL2 model with random weights, so only the form has sense."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.prompts import PromptTemplate

from exl2_rag import ExL2LLM, JsonSchema, SamplingParams
from exl2_rag.adapters.llama_index import ExL2
from exl2_rag.errors import ContextOverflowError
from tests.support.synthetic import make_model_dir

MESSAGES = [
    ChatMessage(role="system", content="Answer in one word, whatever is asked."),
    ChatMessage(role="user", content="What is a page?"),
]
CHAT = [{"role": message.role.value, "content": message.content} for message in MESSAGES]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def model(llm: ExL2LLM) -> ExL2:
    return llm.as_llama_index(**GREEDY)


def soon(holds: Callable[[], bool], seconds: float = 2.0) -> bool:
    """Whether it holds within the time: a cancelled request leaves between two steps of the engine."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


async def asoon(holds: Callable[[], bool]) -> bool:
    return await asyncio.to_thread(soon, holds)


async def test_all_four_ways_of_chat_say_what_the_engine_says(llm: ExL2LLM, model: ExL2) -> None:
    model.chat(MESSAGES)  # now everything is cached for all of them alike
    expected = llm.chat(CHAT, SamplingParams(**GREEDY))
    responses = [model.chat(MESSAGES), await model.achat(MESSAGES), list(model.stream_chat(MESSAGES))[-1]]
    responses.append([part async for part in await model.astream_chat(MESSAGES)][-1])
    for response in responses:
        assert response.message.content == expected.text
        assert response.raw["finish_reason"] == expected.finish_reason
        assert response.raw["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
        assert response.raw["usage"]["prompt_tokens_details"]["cached_tokens"] == expected.usage.cached_tokens


async def test_all_four_ways_of_complete_take_the_chat_template(llm: ExL2LLM, model: ExL2) -> None:
    expected = llm.chat([{"role": "user", "content": "Once upon"}], SamplingParams(**GREEDY)).text
    assert model.complete("Once upon").text == expected
    assert (await model.acomplete("Once upon")).text == expected
    assert list(model.stream_complete("Once upon"))[-1].text == expected
    assert [part async for part in await model.astream_complete("Once upon")][-1].text == expected


def test_a_formatted_prompt_is_continued(llm: ExL2LLM, model: ExL2) -> None:
    assert model.complete("Once upon", formatted=True).text == llm.generate("Once upon", SamplingParams(**GREEDY)).text


def test_a_base_model_without_a_chat_template_continues_the_prompt(tmp_path: Path) -> None:
    directory = make_model_dir(tmp_path / "base")
    config = directory / "tokenizer_config.json"
    assert "chat_template" in config.read_text()
    config.write_text(config.read_text().replace('"chat_template"', '"no_template"'))
    with ExL2LLM(directory, num_threads=1) as base:
        expected = base.generate("Once upon", SamplingParams(**GREEDY)).text
        assert ExL2(llm=base, **GREEDY).complete("Once upon").text == expected


def test_deltas_add_up_to_the_text_so_far(model: ExL2) -> None:
    parts = list(model.stream_chat(MESSAGES))
    assert len(parts) > 3
    for number, part in enumerate(parts):
        assert part.message.content == "".join(str(earlier.delta) for earlier in parts[: number + 1])


def test_stop_and_max_tokens_of_a_call(model: ExL2) -> None:
    text = str(model.chat(MESSAGES).message.content)
    stop = text[4:6]
    assert model.chat(MESSAGES, stop=[stop]).message.content == text[: text.index(stop)]
    short = model.chat(MESSAGES, max_tokens=3)
    assert short.raw["finish_reason"] == "length"
    assert short.raw["usage"]["completion_tokens"] == 3


def test_a_constraint_of_a_call_holds(model: ExL2) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    response = model.chat(MESSAGES, constraint=JsonSchema({**schema, "additionalProperties": False}))
    assert response.message.content in ('{"ok":true}', '{"ok":false}')


def test_predict_runs_through_the_chat_template(llm: ExL2LLM, model: ExL2) -> None:
    expected = llm.chat([{"role": "user", "content": "Say hi"}], SamplingParams(**GREEDY)).text
    assert model.predict(PromptTemplate("Say {what}"), what="hi") == expected


@pytest.mark.parametrize("kept", [False, True], ids=["no handler", "a handler keeps the exception"])
async def test_leaving_streams_frees_their_requests(llm: ExL2LLM, kept: bool) -> None:
    model = llm.as_llama_index(temperature=0, max_tokens=900)
    if kept:
        model.callback_manager = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    stream = model.stream_chat(MESSAGES)
    astream = await model.astream_complete("Go on for long.")
    next(stream)
    await anext(astream)
    assert llm.active_requests == 2
    stream.close()
    await astream.aclose()
    assert await asoon(lambda: llm.active_requests == 0)


async def test_cancelling_a_chat_frees_the_request(llm: ExL2LLM) -> None:
    task = asyncio.create_task(llm.as_llama_index(temperature=0, max_tokens=900).achat(MESSAGES))
    assert await asoon(lambda: llm.active_requests == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asoon(lambda: llm.active_requests == 0)


async def test_an_over_long_prompt_is_a_value_error_with_both_numbers(llm: ExL2LLM, model: ExL2) -> None:
    long = [ChatMessage(role="user", content="x" * 2000)]
    with pytest.raises(ValueError, match=r"2004.*1024") as caught:
        model.chat(long)
    assert isinstance(caught.value, ContextOverflowError)
    with pytest.raises(ContextOverflowError):
        list(model.stream_chat(long))
    with pytest.raises(ContextOverflowError):
        await model.achat(long)
    with pytest.raises(ContextOverflowError):
        _ = [part async for part in await model.astream_chat(long)]
    assert llm.active_requests == 0


def test_metadata_and_tokenizer_are_the_models(model: ExL2) -> None:
    assert model.metadata.context_window == 1024
    assert model.metadata.num_output == 24
    assert model.metadata.model_name == "tiny-exl2"
    assert model.tokenizer("Hi") == [72, 105]


def test_the_token_counting_handler_reads_exact_counts(model: ExL2) -> None:
    counter = TokenCountingHandler(tokenizer=model.tokenizer)
    model.callback_manager = CallbackManager([counter])
    response = model.chat(MESSAGES)
    assert counter.prompt_llm_token_count == response.raw["usage"]["prompt_tokens"]
    assert counter.completion_llm_token_count == response.raw["usage"]["completion_tokens"]


def test_one_model_serves_several_event_loops(model: ExL2) -> None:
    async def ask() -> Any:
        return (await model.achat(MESSAGES)).message.content

    assert asyncio.run(ask()) == asyncio.run(ask()) == model.chat(MESSAGES).message.content

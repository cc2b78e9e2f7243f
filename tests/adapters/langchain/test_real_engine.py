"""The LangChain objects over a real engine: a tiny EXL2 model with random weights, so only the form has sense."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.exceptions import ContextOverflowError as LangChainContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from exl2_rag import ExL2LLM, JsonSchema, SamplingParams
from exl2_rag.adapters.langchain import ChatExL2, ExL2
from exl2_rag.errors import ContextOverflowError

MESSAGES = [SystemMessage("Answer in one word, whatever is asked."), HumanMessage("What is a page?")]
CHAT = [{"role": "system", "content": MESSAGES[0].content}, {"role": "user", "content": MESSAGES[1].content}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def chat(llm: ExL2LLM) -> ChatExL2:
    return llm.as_langchain(**GREEDY)


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


def whole(chunks: list[Any]) -> Any:
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


def test_invoke_is_what_the_engine_says(llm: ExL2LLM, chat: ChatExL2) -> None:
    answer = chat.invoke(MESSAGES)
    expected = llm.chat(CHAT, SamplingParams(**GREEDY))
    assert answer.content == expected.text
    assert answer.response_metadata == {"finish_reason": expected.finish_reason, "model_name": "tiny-exl2"}
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == expected.usage.prompt_tokens
    assert answer.usage_metadata["output_tokens"] == expected.usage.completion_tokens


async def test_all_four_ways_give_the_same_message(chat: ChatExL2) -> None:
    chat.invoke(MESSAGES)  # now everything is cached for all of them alike
    invoked = chat.invoke(MESSAGES)
    messages: list[AIMessage] = [await chat.ainvoke(MESSAGES), whole(list(chat.stream(MESSAGES)))]
    messages.append(whole([chunk async for chunk in chat.astream(MESSAGES)]))
    for message in messages:
        assert message.content == invoked.content
        assert message.usage_metadata == invoked.usage_metadata
        assert message.response_metadata == invoked.response_metadata


def test_a_stream_comes_in_several_pieces(chat: ChatExL2) -> None:
    assert len([chunk for chunk in chat.stream(MESSAGES) if chunk.content]) > 3


def test_a_second_question_reads_the_shared_beginning_from_the_cache(llm: ExL2LLM, chat: ChatExL2) -> None:
    system = SystemMessage("Rules of house seven: " + "be kind and brief; " * 12)
    n_shared = len(llm.encode_chat([{"role": "system", "content": system.content}], add_generation_prompt=False))
    chat.invoke([system, HumanMessage("One?")])
    answer = chat.invoke([system, HumanMessage("Two?")])
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_token_details"]["cache_read"] == n_shared + 1  # the user's turn begins alike


def test_tokens_are_counted_as_the_usage_says(chat: ChatExL2) -> None:
    answer = chat.invoke(MESSAGES)
    assert answer.usage_metadata is not None
    assert chat.get_num_tokens_from_messages(MESSAGES) == answer.usage_metadata["input_tokens"]
    assert chat.get_token_ids("Hi") == [72, 105]


def test_max_tokens_cuts_off_and_says_so(chat: ChatExL2) -> None:
    answer = chat.invoke(MESSAGES, max_tokens=3)
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 3


def test_stop_strings_end_the_answer_and_are_not_part_of_it(chat: ChatExL2) -> None:
    text = str(chat.invoke(MESSAGES).content)
    stop = text[4:6]
    stopped = chat.invoke(MESSAGES, stop=[stop])
    assert stopped.content == text[: text.index(stop)]
    assert stopped.response_metadata["finish_reason"] == "stop"
    assert "".join(str(chunk.content) for chunk in chat.stream(MESSAGES, stop=[stop])) == stopped.content


def test_a_constraint_holds_and_can_be_bound(chat: ChatExL2) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    answer = chat.bind(constraint=JsonSchema(schema)).invoke(MESSAGES)
    assert answer.content in ('{"ok":true}', '{"ok":false}')


def test_batches_answer_as_single_prompts_do(chat: ChatExL2) -> None:
    prompts = ["One?", "Two, please, at some length?", "Three?"]
    assert [a.content for a in chat.batch(prompts)] == [chat.invoke(prompt).content for prompt in prompts]  # type: ignore[arg-type]


async def test_async_batches_answer_as_single_prompts_do(chat: ChatExL2) -> None:
    prompts = ["One?", "Two, please, at some length?", "Three?"]
    answers = await chat.abatch(prompts)  # type: ignore[arg-type]
    assert [a.content for a in answers] == [(await chat.ainvoke(prompt)).content for prompt in prompts]


# Leaving early


def test_leaving_a_stream_frees_the_request(llm: ExL2LLM) -> None:
    stream = llm.as_langchain(temperature=0, max_tokens=900).stream("Go on for long.")
    next(stream)
    assert llm.active_requests == 1
    stream.close()  # type: ignore[attr-defined]
    assert soon(lambda: llm.active_requests == 0)


async def test_closing_an_async_stream_frees_the_request(llm: ExL2LLM) -> None:
    stream = llm.as_langchain(temperature=0, max_tokens=900).astream("Go on for long.")
    await anext(stream)
    assert llm.active_requests == 1
    await stream.aclose()  # type: ignore[attr-defined]
    assert await asoon(lambda: llm.active_requests == 0)


async def test_cancelling_an_invoke_frees_the_request(llm: ExL2LLM) -> None:
    task = asyncio.create_task(llm.as_langchain(temperature=0, max_tokens=900).ainvoke("Go on for long."))
    assert await asoon(lambda: llm.active_requests == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asoon(lambda: llm.active_requests == 0)


async def test_cancelling_a_batch_frees_all_its_requests(llm: ExL2LLM) -> None:
    model = ExL2(llm=llm, temperature=0, max_tokens=900)
    task = asyncio.create_task(model.abatch(["Go on.", "Go further."]))
    assert await asoon(lambda: llm.active_requests == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asoon(lambda: llm.active_requests == 0)


async def test_leaving_the_pipe_frees_the_request(llm: ExL2LLM) -> None:
    chain = ChatPromptTemplate.from_messages([("user", "{q}")]) | llm | StrOutputParser()
    stream, astream = chain.stream({"q": "Go on."}), chain.astream({"q": "Go on."})
    next(stream)
    await anext(astream)
    stream.close()  # type: ignore[attr-defined]
    await astream.aclose()  # type: ignore[attr-defined]
    assert await asoon(lambda: llm.active_requests == 0)


# Errors


async def test_an_over_long_prompt_is_an_error_with_both_numbers_on_every_way(llm: ExL2LLM, chat: ChatExL2) -> None:
    long = "x" * 2000
    with pytest.raises(LangChainContextOverflowError, match="1024") as caught:
        chat.invoke(long)
    assert isinstance(caught.value, ContextOverflowError)
    assert (caught.value.prompt_tokens, caught.value.limit_tokens) == (2004, 1024)
    with pytest.raises(LangChainContextOverflowError):
        list(chat.stream(long))
    with pytest.raises(LangChainContextOverflowError):
        await chat.ainvoke(long)
    with pytest.raises(LangChainContextOverflowError):
        _ = [chunk async for chunk in chat.astream(long)]
    with pytest.raises(LangChainContextOverflowError):
        ExL2(llm=llm).batch(["short", long])
    assert llm.active_requests == 0


# The engine in a pipe as it is


async def test_the_pipe_invokes_streams_batches_and_is_async(llm: ExL2LLM) -> None:
    template = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{q}")])
    chain = template | llm | StrOutputParser()
    # It samples, and a model of random weights may end its turn at once; not every time.
    texts = [await chain.ainvoke({"q": "Hi"}) for _ in range(6)]
    streams = [list(chain.stream({"q": "Hi"})) for _ in range(6)]
    astreams = [[piece async for piece in chain.astream({"q": "Hi"})] for _ in range(6)]
    assert any(texts)
    assert max(len([piece for piece in pieces if piece]) for pieces in streams) > 3
    assert max(len([piece for piece in pieces if piece]) for pieces in astreams) > 3
    assert len(chain.batch([{"q": "a"}, {"q": "b"}])) == 2
    assert len(await chain.abatch([{"q": "a"}, {"q": "b"}])) == 2
    assert llm.active_requests == 0


def test_usage_of_a_pipe_reaches_callbacks(llm: ExL2LLM) -> None:
    usage = UsageMetadataCallbackHandler()
    (ChatPromptTemplate.from_messages([("user", "{q}")]) | llm).invoke({"q": "Hi"}, config={"callbacks": [usage]})
    assert usage.usage_metadata["tiny-exl2"]["input_tokens"] == len(
        llm.encode_chat([{"role": "user", "content": "Hi"}])
    )


# Sharing


def test_adapters_of_one_directory_share_one_engine_until_it_is_closed(model_dir: Path) -> None:
    first, second = ChatExL2(model_dir=model_dir), ExL2(model_dir=str(model_dir))
    assert first.engine is second.engine
    first.engine.close()
    third = ChatExL2(model_dir=model_dir)
    assert third.engine is not first.engine
    assert third.invoke("Hi", max_tokens=2).usage_metadata is not None
    third.engine.close()


def test_one_model_serves_several_event_loops_and_threads(chat: ChatExL2) -> None:
    expected = chat.invoke("Hi").content

    async def ask() -> Any:
        return (await chat.ainvoke("Hi")).content

    assert asyncio.run(ask()) == expected
    assert asyncio.run(ask()) == expected
    assert [answer.content for answer in chat.batch(["Hi"] * 6)] == [expected] * 6  # type: ignore[list-item]


async def test_it_can_be_used_synchronously_inside_a_running_loop(chat: ChatExL2) -> None:
    assert chat.invoke("Hi").content == (await chat.ainvoke("Hi")).content


# Completion model


async def test_completions_continue_the_text_on_every_way(llm: ExL2LLM) -> None:
    model = ExL2(llm=llm, **GREEDY)
    expected = llm.generate("Once upon", SamplingParams(**GREEDY)).text
    assert model.invoke("Once upon") == expected
    assert model.batch(["Once upon", "Twice"])[0] == expected
    assert "".join(model.stream("Once upon")) == expected
    assert await model.ainvoke("Once upon") == expected
    assert "".join([piece async for piece in model.astream("Once upon")]) == expected

"""An engine handle in a LangChain pipe as it is: `prompt | llm | parser`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import Runnable

from exl2_rag.adapters import as_langchain, as_llama_index
from exl2_rag.errors import SettingsError
from tests.adapters.fake_engine import FakeEngine

PIECES = ["Hello", ", ", "world"]


def chain_of(fake: FakeEngine) -> Runnable[dict[str, str], str]:
    return ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{q}")]) | fake | StrOutputParser()


def test_the_pipe_invokes_the_chat_template(fake: FakeEngine) -> None:
    assert chain_of(fake).invoke({"q": "Hi"}) == "Hello, world"
    assert fake.asked[0].method == "chat"
    assert fake.asked[0].prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_the_pipe_streams_piece_by_piece(fake: FakeEngine) -> None:
    assert [piece for piece in chain_of(fake).stream({"q": "Hi"}) if piece] == PIECES
    assert fake.asked[0].method == "stream_chat"


async def test_the_pipe_is_async_with_the_engines_own_async(fake: FakeEngine) -> None:
    chain = chain_of(fake)
    assert await chain.ainvoke({"q": "Hi"}) == "Hello, world"
    assert [piece async for piece in chain.astream({"q": "Hi"}) if piece] == PIECES
    assert [asked.method for asked in fake.asked] == ["achat", "astream_chat"]


async def test_the_pipe_runs_batches(fake: FakeEngine) -> None:
    questions = [{"q": "a"}, {"q": "b"}, {"q": "c"}]
    assert chain_of(fake).batch(questions) == ["Hello, world"] * 3
    assert await chain_of(fake).abatch(questions) == ["Hello, world"] * 3


async def test_leaving_the_pipe_frees_the_request(fake: FakeEngine) -> None:
    stream, astream = chain_of(fake).stream({"q": "Hi"}), chain_of(fake).astream({"q": "Hi"})
    next(stream)
    await anext(astream)
    assert fake.active_requests == 2
    stream.close()  # type: ignore[attr-defined]
    await astream.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0.01)
    assert fake.active_requests == 0


@pytest.mark.parametrize("piped", ["Hi", [HumanMessage("Hi")], [("user", "Hi")]])
def test_text_and_messages_are_taken_too(fake: FakeEngine, piped: Any) -> None:
    assert fake(piped).invoke(piped).content == "Hello, world"


def test_a_text_prompt_template_is_taken_too(fake: FakeEngine) -> None:
    assert (PromptTemplate.from_template("Say {w}") | fake | StrOutputParser()).invoke({"w": "hi"}) == "Hello, world"
    assert fake.asked[0].prompt == [{"role": "user", "content": "Say hi"}]


@pytest.mark.parametrize("piped", [{"q": "Hi"}, 3, None, []])
def test_anything_else_is_refused_with_what_to_do(fake: FakeEngine, piped: Any) -> None:
    with pytest.raises(SettingsError, match=r"expected a prompt, .* llm\.generate"):
        fake(piped)


def test_as_langchain_and_as_llama_index_share_the_engine(fake: FakeEngine) -> None:
    engine: Any = fake
    assert as_langchain(engine, temperature=0.2).invoke("Hi").content == "Hello, world"
    assert as_llama_index(engine, temperature=0.2).complete("Hi").text == "Hello, world"
    assert {asked.sampling.temperature for asked in fake.asked} == {0.2}

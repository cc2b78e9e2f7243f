"""LangChain messages become chat messages, or an error says what cannot."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from exl2_rag.adapters.langchain.messages import text_of, to_chat_chunk, to_chat_messages
from exl2_rag.errors import SettingsError
from exl2_rag.llm.request import StreamPiece, Usage


def test_roles_and_text_carry_over() -> None:
    messages = [SystemMessage("Be brief."), HumanMessage("Hi"), AIMessage("Hello"), ChatMessage("x", role="critic")]
    assert to_chat_messages(messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "critic", "content": "x"},
    ]


def test_a_name_carries_over() -> None:
    assert to_chat_messages([HumanMessage("Hi", name="Ada")])[0]["name"] == "Ada"


def test_text_blocks_are_joined() -> None:
    assert text_of([{"type": "text", "text": "one "}, "two", {"type": "text", "text": " three"}]) == "one two three"


def test_conversion_leaves_the_messages_as_they_were() -> None:
    message = HumanMessage([{"type": "text", "text": "Hi"}])
    before = message.model_dump()
    to_chat_messages([message])
    assert message.model_dump() == before


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": "AAAA", "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}},
        {"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"},
        {"type": "file", "base64": "AAAA", "mime_type": "application/pdf"},
        {"type": "reasoning", "reasoning": "hm"},
        {"no": "type"},
    ],
)
def test_a_block_that_is_not_text_is_refused(block: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="takes text only"):
        to_chat_messages([HumanMessage([block])])


@pytest.mark.parametrize(
    "message",
    [
        ToolMessage("4", tool_call_id="1"),
        FunctionMessage("4", name="add"),
        AIMessage("", tool_calls=[{"name": "add", "args": {}, "id": "1"}]),
        AIMessage([{"type": "tool_use", "id": "1", "name": "add", "input": {}}]),
    ],
)
def test_tools_in_the_history_are_refused_as_not_supported_yet(message: BaseMessage) -> None:
    with pytest.raises(SettingsError, match="not supported by this adapter yet"):
        to_chat_messages([message])


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(SettingsError, match="at least one message"):
        to_chat_messages([])


def test_a_message_that_is_an_instruction_to_the_framework_is_refused() -> None:
    with pytest.raises(SettingsError, match="RemoveMessage cannot be part of a chat"):
        to_chat_messages([RemoveMessage(id="1")])


def test_a_piece_without_text_makes_no_chunk() -> None:
    assert to_chat_chunk(StreamPiece("", (7,)), "m") is None


def test_only_the_last_piece_has_usage_and_metadata() -> None:
    first = to_chat_chunk(StreamPiece("a", (1,)), "m")
    last = to_chat_chunk(StreamPiece("b", (2,), "length", Usage(5, 3, 2)), "m")
    assert first is not None
    assert last is not None
    assert first.message.response_metadata == {}
    assert first.message.usage_metadata is None
    assert last.message.response_metadata == {"finish_reason": "length", "model_name": "m"}
    assert last.message.usage_metadata == {
        "input_tokens": 5,
        "output_tokens": 2,
        "total_tokens": 7,
        "input_token_details": {"cache_read": 3},
    }
    assert (first + last).text == "ab"

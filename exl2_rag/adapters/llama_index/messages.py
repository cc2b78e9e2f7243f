"""LlamaIndex messages to the engine's chat messages, and results back. What cannot be carried over is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)

from exl2_rag.adapters.shared import not_yet, usage_counts
from exl2_rag.errors import SettingsError
from exl2_rag.llm.request import GenerationResult, StreamPiece

# LlamaIndex has a role for every provider's habit; chat templates know three.
ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_chat_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The form in which chat templates take messages. The given messages stay as they are.

    Raises:
        SettingsError: no message, a role or content that this adapter does not carry.
    """
    if not messages:
        raise SettingsError("expected at least one message, got an empty list")
    return [_to_chat_message(message) for message in messages]


def _to_chat_message(message: ChatMessage) -> dict[str, Any]:
    if message.role not in ROLES:
        raise not_yet(f"a message with the role {message.role.value!r}")
    if message.additional_kwargs.get("tool_calls"):
        raise not_yet("a tool call in the history")
    text = []
    for block in message.blocks:
        if isinstance(block, ToolCallBlock):
            raise not_yet("a tool call in the history")
        if not isinstance(block, TextBlock):
            raise SettingsError(f"expected text content, got a {type(block).__name__}; this model takes text only")
        text.append(block.text)
    return {"role": ROLES[message.role], "content": "\n".join(text)}


def raw_of(result: GenerationResult | StreamPiece, model_name: str) -> dict[str, Any] | None:
    """What `response.raw` holds: usage, finish reason and model; None until a stream is at its end."""
    if result.finish_reason is None or result.usage is None:
        return None
    return {"usage": usage_counts(result.usage), "finish_reason": result.finish_reason, "model": model_name}


def to_chat_response(text: str, *, delta: str | None, raw: dict[str, Any] | None) -> ChatResponse:
    """An answer, or a part of a stream: `text` is all of it so far, `delta` what is new."""
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta, raw=raw)


def to_completion_response(text: str, *, delta: str | None, raw: dict[str, Any] | None) -> CompletionResponse:
    """A completion, or a part of a stream: `text` is all of it so far, `delta` what is new."""
    return CompletionResponse(text=text, delta=delta, raw=raw)

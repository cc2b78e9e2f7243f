"""LangChain messages to the engine's chat messages, and results back. What cannot be carried over is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    UsageMetadata,
)
from langchain_core.messages.ai import InputTokenDetails
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from exl2_rag.adapters.shared import not_yet
from exl2_rag.errors import SettingsError
from exl2_rag.llm.request import GenerationResult, StreamPiece, Usage

ROLES: dict[type[BaseMessage], str] = {SystemMessage: "system", HumanMessage: "user", AIMessage: "assistant"}
# Content blocks that belong to tool calling, in the spellings of the common providers.
TOOL_BLOCKS = {"tool_use", "tool_result", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call"}


def to_chat_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """The form in which chat templates take messages. The given messages stay as they are.

    Raises:
        SettingsError: no message, a kind of message or content that this adapter does not carry.
    """
    if not messages:
        raise SettingsError("expected at least one message, got an empty list")
    return [_to_chat_message(message) for message in messages]


def _to_chat_message(message: BaseMessage) -> dict[str, Any]:
    if getattr(message, "tool_calls", None) or getattr(message, "invalid_tool_calls", None):
        raise not_yet("a tool call in the history")
    if isinstance(message, ChatMessage):
        role = message.role
    else:
        role = next((role for kind, role in ROLES.items() if isinstance(message, kind)), "")
    if message.type in {"tool", "function"}:
        raise not_yet("a tool's result in the history")
    if not role:
        raise SettingsError(f"a {type(message).__name__} cannot be part of a chat; expected system, user or assistant")
    converted: dict[str, Any] = {"role": role, "content": text_of(message.content)}
    if message.name:
        converted["name"] = message.name
    return converted


def text_of(content: str | list[str | dict[str, Any]]) -> str:
    """The text of a message's content.

    Raises:
        SettingsError: a content block that is not text.
    """
    if isinstance(content, str):
        return content
    return "".join(_block_text(block) for block in content)


def _block_text(block: str | dict[str, Any]) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type")
    if kind == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind in TOOL_BLOCKS:
        raise not_yet(f"a content block of type {kind!r}")
    raise SettingsError(f"expected text content, got a content block of type {kind!r}; this model takes text only")


def usage_metadata(usage: Usage) -> UsageMetadata:
    """Token counts as LangChain names them; `cache_read` is the part of the prompt that was not computed again."""
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def to_chat_result(result: GenerationResult, model_name: str) -> ChatResult:
    """A finished answer."""
    message = AIMessage(
        content=result.text,
        usage_metadata=usage_metadata(result.usage),
        response_metadata={"finish_reason": result.finish_reason, "model_name": model_name},
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def to_chat_chunk(piece: StreamPiece, model_name: str) -> ChatGenerationChunk | None:
    """A piece of a stream, or None for one without news.

    Only the last carries usage and metadata: LangChain adds chunks up, so that repeats would be summed.
    """
    if piece.finish_reason is None:
        return ChatGenerationChunk(message=AIMessageChunk(content=piece.text)) if piece.text else None
    message = AIMessageChunk(
        content=piece.text,
        chunk_position="last",
        usage_metadata=usage_metadata(piece.usage) if piece.usage is not None else None,
        response_metadata={"finish_reason": piece.finish_reason, "model_name": model_name},
    )
    return ChatGenerationChunk(message=message)

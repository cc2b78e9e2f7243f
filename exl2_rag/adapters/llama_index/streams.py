"""Engine streams as LlamaIndex streams, closed together with them.

LlamaIndex wraps a stream to report its events, and its wrapper does not close what it wraps: a callback handler that
keeps the exception of an abandoned stream keeps the request running. So the outermost stream is ours again, and
closing it closes the engine's.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import aclosing, closing
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from llama_index.core.base.llms.types import ChatResponse, CompletionResponse

from exl2_rag.adapters.llama_index.messages import raw_of
from exl2_rag.llm.request import StreamPiece

P = ParamSpec("P")
Response = TypeVar("Response", ChatResponse, CompletionResponse)

# The streams that the method running now has opened.
_opened: ContextVar[list[Any]] = ContextVar("opened")


def parts(
    stream: Generator[StreamPiece, None, None], make: Callable[..., Response], model_name: str
) -> Generator[Response, None, None]:
    """The responses of a stream, from `make(text so far, delta=new text, raw=counts)`; only the last has counts."""

    def make_parts() -> Generator[Response, None, None]:
        text = ""
        with closing(stream) as pieces:
            for piece in pieces:
                text += piece.text
                if piece.text or piece.finish_reason is not None:
                    yield make(text, delta=piece.text, raw=raw_of(piece, model_name))

    made = make_parts()
    _opened.get().append(made)
    return made


def aparts(
    stream: AsyncGenerator[StreamPiece, None], make: Callable[..., Response], model_name: str
) -> AsyncGenerator[Response, None]:
    """The responses of an async stream; only the last has counts."""

    async def make_parts() -> AsyncGenerator[Response, None]:
        text = ""
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                text += piece.text
                if piece.text or piece.finish_reason is not None:
                    yield make(text, delta=piece.text, raw=raw_of(piece, model_name))

    made = make_parts()
    _opened.get().append(made)
    return made


def closes_streams(
    method: Callable[P, Generator[Response, None, None]],
) -> Callable[P, Generator[Response, None, None]]:
    """Make a streaming method close what `parts` opened for it when its stream is closed or fails."""

    def close_after(stream: Generator[Response, None, None], opened: list[Any]) -> Generator[Response, None, None]:
        try:
            yield from stream
        finally:
            for inner in opened:
                inner.close()

    @functools.wraps(method)
    def closing_method(*args: P.args, **kwargs: P.kwargs) -> Generator[Response, None, None]:
        opened: list[Any] = []
        token = _opened.set(opened)
        try:
            stream = method(*args, **kwargs)
        finally:
            _opened.reset(token)
        return close_after(stream, opened)

    return closing_method


def closes_async_streams(
    method: Callable[P, Coroutine[Any, Any, AsyncGenerator[Response, None]]],
) -> Callable[P, Coroutine[Any, Any, AsyncGenerator[Response, None]]]:
    """Make an async streaming method close what `aparts` opened for it when its stream is closed or fails."""

    async def close_after(stream: AsyncGenerator[Response, None], opened: list[Any]) -> AsyncGenerator[Response, None]:
        try:
            async with aclosing(stream):
                async for part in stream:
                    yield part
        finally:
            for inner in opened:
                await inner.aclose()

    @functools.wraps(method)
    async def closing_method(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Response, None]:
        opened: list[Any] = []
        token = _opened.set(opened)
        try:
            stream = await method(*args, **kwargs)
        finally:
            _opened.reset(token)
        return close_after(stream, opened)

    return closing_method

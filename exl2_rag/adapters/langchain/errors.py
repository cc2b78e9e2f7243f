"""Errors that LangChain code and code of this package both recognise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from langchain_core.exceptions import ContextOverflowError as LangChainContextOverflowError

from exl2_rag.errors import ContextOverflowError


class PromptTooLongError(ContextOverflowError, LangChainContextOverflowError):
    """The prompt is longer than the model or the cache allows."""


@contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise the engine's context overflow as one that LangChain knows too."""
    try:
        yield
    except ContextOverflowError as error:
        raise PromptTooLongError(
            str(error), prompt_tokens=error.prompt_tokens, limit_tokens=error.limit_tokens
        ) from error

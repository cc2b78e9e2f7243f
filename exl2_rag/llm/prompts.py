"""What a caller may give as a prompt: a text, token ids, or a list of such. Nothing is guessed at."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from operator import index
from typing import Any

from exl2_rag.errors import RequestError

Prompt = str | Seq[int]
Prompts = list[str] | list[list[int]] | tuple[str, ...] | tuple[list[int], ...]


def as_batch(prompt: Prompt | Prompts) -> tuple[list[Prompt], bool]:
    """The prompts, and whether several were given (one in a list counts as several)."""
    if isinstance(prompt, str):
        return [prompt], False
    items = _items(prompt)
    if not items:
        raise RequestError("expected a prompt or a list of prompts, got an empty list")
    if hasattr(items[0], "__index__"):
        return [as_token_ids(items)], False
    return [one if isinstance(one, str) else as_token_ids(one) for one in items], True


def as_token_ids(prompt: Any) -> tuple[int, ...]:
    """Token ids given by the caller, checked to be whole numbers (numpy's are, too)."""
    items = _items(prompt)
    try:
        return tuple(map(index, items))
    except TypeError as error:
        raise _no_prompt(prompt) from error


def _items(prompt: Any) -> list[Any]:
    if isinstance(prompt, str | bytes | Mapping) or not hasattr(prompt, "__iter__"):
        raise _no_prompt(prompt)
    return list(prompt)


def _no_prompt(prompt: Any) -> RequestError:
    return RequestError(
        f"expected a text, a list of token ids, or a list of such prompts; got {type(prompt).__name__} {prompt!r:.80}"
    )

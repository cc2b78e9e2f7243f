"""Which adapters a request asks for. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from numbers import Real
from typing import TYPE_CHECKING, Any

from exl2_rag.errors import RequestError

if TYPE_CHECKING:
    from exl2_rag.llm.lora.shelf import LoraSet

Lora = str | tuple[str, float] | Seq[str | tuple[str, float]]
"""A name, a name with a scale, or several of either."""

LoraChoices = tuple[tuple[str, float], ...]


def lora_choices(lora: Lora | None) -> LoraChoices:
    """What the caller gave as (name, scale) pairs; a name alone has scale 1.

    Raises:
        RequestError: something else, a name twice, or a scale that is no finite number.
    """
    if lora is None:
        return ()
    single = isinstance(lora, str) or (isinstance(lora, tuple) and len(lora) == 2 and _is_scale(lora[1]))
    choices = tuple(_pair(one) for one in ((lora,) if single else _items(lora)))
    names = [name for name, _ in choices]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"lora names '{twice}' twice; give each adapter once, with the scale it is to have")
    return choices


def lora_identity(lora: LoraSet) -> tuple[tuple[str, float], ...]:
    """What the keys and values of a request depend on: the digest and scale of each of its adapters."""
    return tuple((adapter.digest, scale) for adapter, scale in lora)


def _is_scale(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _items(lora: Any) -> list[Any]:
    if not isinstance(lora, list | tuple):
        raise _no_lora(lora)
    return list(lora)


def _pair(one: Any) -> tuple[str, float]:
    if isinstance(one, str):
        return one, 1.0
    if not (isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str) and _is_scale(one[1])):
        raise _no_lora(one)
    name, scale = one[0], float(one[1])
    if not math.isfinite(scale):
        raise RequestError(f"the scale of the LoRA adapter '{name}' must be a finite number, got {scale}")
    return name, scale


def _no_lora(given: Any) -> RequestError:
    return RequestError(
        'lora must be a name, a pair such as ("name", 0.5), or a list of such; '
        f"got {type(given).__name__} {given!r:.80}"
    )

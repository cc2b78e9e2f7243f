"""Blocks of text put together: paragraphs apart, the items of a list and the rows of a table on neighbouring lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Kind = Literal["text", "item", "row", "definition", "listing"]
_TIGHT: frozenset[Kind] = frozenset(("item", "row", "definition"))


def join_blocks(blocks: Iterable[tuple[Kind, str]]) -> str:
    """One text of (kind, text) blocks."""
    pieces: list[str] = []
    previous: Kind = "text"
    for kind, text in blocks:
        if pieces:
            pieces.append("\n" if kind == previous and kind in _TIGHT else "\n\n")
        pieces.append(text)
        previous = kind
    return "".join(pieces)

"""In which order blocks of text continue the deepest cached path. Integers only; changes nothing.

A prompt is a prefix and then some blocks whose order is free, such as the chunks of an answer. Keys and values are
reusable from the front only, so the order decides how much is: the blocks that go on from the prefix on one cached path
come first. Source of the idea: reordering retrieved contexts for prefix caching, as in ContextPilot and RAGCache.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from exl2_rag.llm.page_table import PageTable

MAX_STEPS = 1000
"""Blocks that are tried on a path. Six blocks need 36 where paths do not branch; the bound is for those that do."""


@dataclass(frozen=True, slots=True)
class _Point:
    """A place on a cached path: after `rows` on some page that follows the page with `parent_key`."""

    parent_key: bytes
    rows: tuple[int, ...]


def cached_order(
    table: PageTable,
    prefix: Seq[int],
    blocks: Seq[Seq[int]],
    *,
    first: Seq[Seq[int]] | None = None,
    root: bytes | None = None,
    max_steps: int = MAX_STEPS,
) -> list[int]:
    """The order of blocks that continues the deepest cached path after `prefix`.

    Args:
        prefix: tokens before the blocks; may be empty.
        blocks: tokens of each block, in the order that is preferred where the cache does not care.
        first: tokens of each block where it comes right after the prefix, if they differ there.
        root: see `PageTable.lookup`.
        max_steps: a bound on the search; the best order found until then is returned.

    Returns:
        Indices of all blocks. First those on the deepest path, among equals the one preferred; after them the block, if
        any, that goes on with at least a page of it; then the others as they came. The order depends on what is cached
        at the moment of the call, so it is not the same tomorrow.
    """
    start = _advance(table, _Point(table.root_key if root is None else root, ()), prefix)
    if isinstance(start, int):
        return list(range(len(blocks)))
    search = _Search(table, blocks, blocks if first is None else first, max_steps)
    search.visit(start, [], 0)
    return search.best + [one for one in range(len(blocks)) if one not in search.best]


class _Search:
    """A depth-first search over the orders whose blocks lie on cached paths."""

    def __init__(self, table: PageTable, blocks: Seq[Seq[int]], first: Seq[Seq[int]], max_steps: int) -> None:
        self.best: list[int] = []
        self._best_tokens = 0
        self._table = table
        self._blocks = blocks
        self._first = first
        self._steps_left = max_steps

    def visit(self, point: _Point, path: list[int], n_tokens: int) -> None:
        """Try every block that is not on the path yet after it."""
        for number, block in enumerate(self._blocks):
            if number in path or not block:
                continue
            if not self._steps_left:
                return
            self._steps_left -= 1
            tokens = block if path else self._first[number]
            reached = _advance(self._table, point, tokens)
            if isinstance(reached, int):
                if reached >= self._table.page_size:
                    self._offer([*path, number], n_tokens + reached)
                continue
            self._offer([*path, number], n_tokens + len(tokens))
            self.visit(reached, [*path, number], n_tokens + len(tokens))

    def _offer(self, path: list[int], n_tokens: int) -> None:
        if n_tokens > self._best_tokens:
            self.best, self._best_tokens = path, n_tokens


def _advance(table: PageTable, point: _Point, tokens: Seq[int]) -> _Point | int:
    """Where these tokens lead on a cached path, or how many of them are cached if not all are."""
    parent_key, rest = point.parent_key, [*point.rows, *tokens]
    start = 0
    while len(rest) - start >= table.page_size:
        page = rest[start : start + table.page_size]
        key = table.page_key(parent_key, page)
        if not table.has_page(key, page):
            break
        parent_key = key
        start += table.page_size
    page = rest[start : start + table.page_size]
    n_rows = table.matching_rows(parent_key, page)
    if n_rows == len(page) and start + n_rows == len(rest):
        return _Point(parent_key, tuple(page))
    return max(0, start + n_rows - len(point.rows))

"""Why a prompt took from the cache what it took, and no more. Integers only; `cache_explanation` puts it into words.

prompt   the cat sat on the mat and slept .
nearest  the cat sat on the roof and fell .        what the cache has that agrees longest
                            ^ differs_at
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

from exl2_rag.llm.page_table import PageTable

MissReason = Literal["last token", "other text", "never seen", "evicted", "other identity", "no room"]

SHOWN_TOKENS = 32
"""Tokens of the nearest cached text that are kept after the difference."""

MAX_OTHER_ROOTS = 64
"""Other roots that are looked at; a look costs the hash of one page."""


@dataclass(frozen=True, slots=True)
class PrefixTrace:
    """What a prompt found in the page table.

    Attributes:
        n_reused: leading tokens taken from the cache.
        differs_at: index of the first token that was not found; equal to `n_reused` unless there was no room for rows.
        reason: why it was not:
            "last token": everything was there; the last token is always computed, for its logits.
            "other text": the nearest cached text goes on with another token.
            "never seen": nothing cached goes on from here.
            "evicted": it was there, and its place was needed or `evict` was called.
            "other identity": nothing is here, but the text is there for another salt, or with other adapters.
            "no room": it is there, but no page was free to copy rows to.
        nearest: up to `SHOWN_TOKENS` tokens of the nearest cached text from `differs_at` on.
        n_evicted: tokens from `differs_at` on that were there before they were evicted; 0 if that is not known.
        other_root: the root under which the text is, for "other identity".
    """

    n_reused: int
    differs_at: int
    reason: MissReason
    nearest: tuple[int, ...] = ()
    n_evicted: int = 0
    other_root: bytes | None = None


def trace_prefix(
    table: PageTable,
    token_ids: Seq[int],
    limit: int,
    *,
    known_keys: list[bytes] | None = None,
    root: bytes | None = None,
    other_roots: Iterable[bytes] = (),
) -> PrefixTrace:
    """What `table.hold` would find for a prompt now, and why no more. Changes nothing.

    Takes a look at each page of the prompt that is cached, at the neighbours of the first that is not, and at the first
    page below each of up to `MAX_OTHER_ROOTS` other roots when nothing is found below `root`.

    Args:
        limit: how many tokens may be reused.
        known_keys: see `PageTable.lookup`.
        other_roots: where else the same text may lie; the most likely first.
    """
    root = table.root_key if root is None else root
    known_keys = [] if known_keys is None else known_keys
    match = table.lookup(token_ids, limit, known_keys, root)
    n_reused = match.n_tokens
    if n_reused >= limit:
        return PrefixTrace(n_reused, n_reused, "last token")
    parent_key = match.keys[-1] if match.keys else root
    start = len(match.pages) * table.page_size
    nearest = table.text_after(parent_key, match.source, match.n_rows, SHOWN_TOKENS)
    lost = _evicted_tokens(table, token_ids, limit, known_keys, parent_key, start)
    if lost > match.n_rows:
        return PrefixTrace(n_reused, n_reused, "evicted", nearest, lost - match.n_rows)
    if not match.pages:
        for other in _first(other_roots, MAX_OTHER_ROOTS):
            if other != root and _first_page_match(table, token_ids, limit, other) > n_reused:
                return PrefixTrace(n_reused, n_reused, "other identity", nearest, other_root=other)
    return PrefixTrace(n_reused, n_reused, "other text" if nearest else "never seen", nearest)


def _evicted_tokens(
    table: PageTable, token_ids: Seq[int], limit: int, known_keys: list[bytes], parent_key: bytes, start: int
) -> int:
    """How many tokens from `start`, the end of the last cached page, on lay on pages that were evicted."""
    place, size = start, table.page_size
    while place + size <= limit:
        number = place // size
        if number == len(known_keys):
            known_keys.append(table.page_key(parent_key, token_ids[place : place + size]))
        if not table.evicted.has(known_keys[number]):
            break
        parent_key = known_keys[number]
        place += size
    return place - start + table.evicted.longest_match(parent_key, token_ids[place : min(limit, place + size)])


def _first_page_match(table: PageTable, token_ids: Seq[int], limit: int, root: bytes) -> int:
    return table.lookup(token_ids, min(limit, table.page_size), root=root).n_tokens


def _first(roots: Iterable[bytes], count: int) -> Iterable[bytes]:
    for number, root in enumerate(roots):
        if number == count:
            return
        yield root

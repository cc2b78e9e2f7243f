"""Why a prompt would find no more in host memory and on disk. Changes nothing. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from exl2_rag.llm.kv_store.tier_report import TierPeek
from exl2_rag.llm.kv_store.tiers import CacheTiers
from exl2_rag.llm.page_table import common_prefix
from exl2_rag.llm.prefix_trace import SHOWN_TOKENS, PrefixTrace

MAX_NEIGHBOURS = 256
"""Stored pages after the same one that are compared with the prompt, the last used first."""


def trace_tiers(
    trace: PrefixTrace, tiers: CacheTiers, token_ids: Seq[int], limit: int, root: bytes
) -> tuple[PrefixTrace, TierPeek]:
    """Go on from what memory holds: whole pages only, for tiers keep no others.

    Args:
        trace: of the page table alone.
        limit: how many tokens may be reused.

    Returns:
        The trace of all together, and where its reused tokens would come from. Whether loading would take longer than
        computing is decided at admission only.
    """
    if trace.n_reused >= limit:
        return trace, TierPeek(trace.n_reused, 0, 0)
    peek = tiers.peek(token_ids, limit, root)
    found = peek.cache_tokens + peek.ram_tokens + peek.disk_tokens
    if found == limit:
        return PrefixTrace(found, found, "last token"), peek
    neighbours, rest = [], token_ids[found:limit]
    if tiers.store is not None:
        neighbours = tiers.store.following(tiers.chain_end(token_ids, found, root), MAX_NEIGHBOURS)
    best = max(neighbours, key=lambda page: common_prefix(page, rest), default=())
    n_rows = common_prefix(best, rest)
    if found <= trace.n_reused and found + n_rows <= trace.differs_at and (trace.nearest or not best):
        return trace, TierPeek(trace.n_reused, 0, 0)
    nearest = tuple(best[n_rows : n_rows + SHOWN_TOKENS])
    if found <= trace.n_reused:  # memory has as much, to the token; the store has the nearest text
        peek = TierPeek(trace.n_reused, 0, 0)
    n_reused = max(found, trace.n_reused)
    return PrefixTrace(
        n_reused, max(found + n_rows, n_reused), "other text" if nearest else "never seen", nearest
    ), peek

"""Which documents stand where in a prompt, so that a document's pages can be erased from the engine's KV store.

Keys and values can be turned back into text. So a document that is taken out of the index must leave the store as well:
prompts name their documents, and where each begins, and whoever removes or changes one purges it.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exl2_rag.retrieval.index import DocumentIndex
    from exl2_rag.retrieval.indexer import IndexReport


def kv_source(index_id: str, source: str) -> str:
    """The id of a document in a KV store, which may serve several indexes."""
    return f"{index_id}/{source}"


def document_positions(token_ids: Seq[int], blocks: Iterable[tuple[str, Seq[int]]]) -> dict[str, int]:
    """Where the first token of each document stands in a prompt.

    Args:
        blocks: (id, token ids) of each document's text, best in the order in which they stand in the prompt.

    Returns:
        By id. A block that is not found as it is (a template may have changed it) counts from the end of the one before
        it: rather too early than too late.
    """
    positions: dict[str, int] = {}
    place = 0
    for source, block in blocks:
        found = _find(token_ids, block, place)
        if found is None:
            found = _find(token_ids, block, 0)
        start, place = (place, place) if found is None else (found, found + len(block))
        positions[source] = min(start, positions.get(source, start))
    return positions


def purge_changed(kv_store: Path, index: DocumentIndex, report: IndexReport) -> int:
    """Erase from a store's directory what was made from documents that an update read anew, or the index lacks now.

    That includes those that an earlier update removed, if it was cut short before it came to this.

    Returns:
        How many pages are gone.

    Raises:
        KVStoreError: a process writes to the store now; it can purge them itself (`DocumentQA.purge`).
    """
    from exl2_rag.llm.kv_store.maintenance import purge_sources, stored_sources

    if not kv_store.is_dir():
        return 0
    current = {kv_source(index.index_id, source) for source in index.sources()}
    own = {source for source in stored_sources(kv_store) if source.startswith(kv_source(index.index_id, ""))}
    changed = {kv_source(index.index_id, source) for source in (*report.removed, *report.indexed)}
    gone = own & (changed | (own - current))
    return purge_sources(kv_store, sorted(gone)) if gone else 0


def _find(token_ids: Seq[int], block: Seq[int], start: int) -> int | None:
    if not block:
        return None
    wanted = list(block)
    for place in range(start, len(token_ids) - len(wanted) + 1):
        if token_ids[place] == wanted[0] and list(token_ids[place : place + len(wanted)]) == wanted:
            return place
    return None

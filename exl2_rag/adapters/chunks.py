"""A retrieved chunk as the metadata both frameworks carry beside its text. Knows no framework."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl2_rag.errors import SettingsError

if TYPE_CHECKING:
    from exl2_rag.retrieval import DocumentIndex
    from exl2_rag.retrieval.document import ScoredChunk


def chunk_metadata(found: ScoredChunk) -> dict[str, Any]:
    """Where a chunk comes from: `page` is None for files without pages, `start` and `end` count characters."""
    chunk = found.chunk
    return {
        "source": chunk.source,
        "title": chunk.title,
        "heading": chunk.heading,
        "page": chunk.page,
        "start": chunk.start,
        "end": chunk.end,
        "label": chunk.label,
        "score": found.score,
    }


def find_index(index: Any, index_dir: str | Path | None) -> DocumentIndex:
    """The index given, or the one at a path, opened.

    Raises:
        SettingsError: neither or both are given, or `index` is not an index.
        RetrievalError: the index cannot be opened.
    """
    from exl2_rag.retrieval import DocumentIndex

    if (index is None) == (index_dir is None):
        given = "neither" if index is None else "both"
        raise SettingsError(f"expected either index=<DocumentIndex> or index_dir=<directory>, got {given}")
    if index_dir is not None:
        return DocumentIndex.open(Path(index_dir))
    if not isinstance(index, DocumentIndex):
        raise SettingsError(f"index must be a DocumentIndex, got {type(index).__name__}; to open one use index_dir=…")
    return index

"""A retrieved chunk as the metadata both frameworks carry beside its text, and the retriever that found it. Knows no
framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exl2_rag.errors import SettingsError

if TYPE_CHECKING:
    from exl2_rag.retrieval.document import ScoredChunk
    from exl2_rag.retrieval.retriever import Retriever


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


def find_retriever(index: Any) -> Retriever:
    """The retriever given, or one with the default settings over the index given.

    Raises:
        SettingsError: it is neither.
    """
    from exl2_rag.retrieval.index import DocumentIndex
    from exl2_rag.retrieval.retriever import Retriever

    if isinstance(index, DocumentIndex):
        return Retriever(index)
    if not isinstance(index, Retriever):
        raise SettingsError(
            f"index must be a DocumentIndex or a Retriever, got {type(index).__name__}; "
            "open one with DocumentIndex.open(directory)"
        )
    return index

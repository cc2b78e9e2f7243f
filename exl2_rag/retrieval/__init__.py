"""Text in, ranked chunks out. Knows nothing of the engine.

`DocumentIndex` keeps documents, `Retriever` searches them. Heavy libraries are imported when they are first used.
"""

from __future__ import annotations

from exl2_rag.retrieval.document import Chunk, Document, ScoredChunk
from exl2_rag.retrieval.index import DocumentIndex
from exl2_rag.retrieval.indexer import IndexReport, Refusal
from exl2_rag.retrieval.loaders import LoadLimits, load_document
from exl2_rag.retrieval.retriever import Retriever

__all__ = [
    "Chunk",
    "Document",
    "DocumentIndex",
    "IndexReport",
    "LoadLimits",
    "Refusal",
    "Retriever",
    "ScoredChunk",
    "load_document",
]

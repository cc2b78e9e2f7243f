"""A small real index of two documents, one of them with pages."""

from __future__ import annotations

from pathlib import Path

from exl2_rag.retrieval.document import Document
from exl2_rag.retrieval.index import DocumentIndex

ENGINE = Document(
    source="manual/engine.md",
    title="Engine manual",
    text="# Pages\n\nA page holds 32 tokens by default. Pinned pages are never evicted.\n\n"
    "# Scheduler\n\nWhen no page is left, the scheduler preempts the youngest request.",
    media_type="text/markdown",
    markup="markdown",
)
PETS = Document(
    source="pets.pdf",
    title="Pets",
    text="Cats sleep sixteen hours a day.\n\nDogs bark at three metres.",
    media_type="application/pdf",
    page_starts=(0, 33),
)


def make_index(path: Path) -> DocumentIndex:
    """An open index of the two documents, with the exact store."""
    index = DocumentIndex.create_or_open(path, store="exact")
    index.add([ENGINE, PETS])
    return index

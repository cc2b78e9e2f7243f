"""Where vectors are kept: the protocol, and nothing of how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from exl2_rag.retrieval.embedding import Vectors

Metadata = Mapping[str, str | int | float | bool]


class VectorStore(Protocol):
    """Vectors of length 1 by id, each with a little metadata, searched by cosine similarity."""

    def upsert(self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata]) -> None:
        """Add vectors [n, dimension], or replace those of the same id."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors; unknown ids are fine."""

    def query(self, vector: Vectors, k: int, where: Metadata | None = None) -> list[tuple[str, float]]:
        """The k nearest to `vector` [dimension] as (id, cosine similarity), best first.

        `where` keeps only vectors whose metadata has all of these values.
        """

    def ids(self) -> set[str]:
        """All ids."""

    def count(self) -> int:
        """How many vectors there are."""

    def flush(self) -> None:
        """Make everything so far durable."""

    def close(self) -> None:
        """Flush and let go of files and locks."""

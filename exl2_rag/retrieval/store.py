"""Where vectors are kept: the protocol, and nothing of how.

The text of a chunk is not here but in the manifest, so a store can be thrown away and filled again from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from exl2_rag.retrieval.embedding import Vectors

Metadata = Mapping[str, str | int | float | bool]


class VectorStore(Protocol):
    """Vectors of length 1 by id, each with a little metadata, searched by cosine similarity.

    Safe to be called from several threads of one process. What a call has changed is durable when it returns.
    """

    def upsert(self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata]) -> None:
        """Add vectors [n, dimension], or replace those of the same id."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors; unknown ids are fine."""

    def query(self, vector: Vectors, k: int, where: Metadata | None = None) -> list[tuple[str, float]]:
        """The k nearest to `vector` [dimension] as (id, cosine similarity), best first.

        `where` keeps only vectors whose metadata has all of these values.
        """

    def vectors(self, ids: Sequence[str]) -> dict[str, Vectors]:
        """The vectors [dimension] of those of these ids that are there."""

    def ids(self) -> set[str]:
        """All ids."""

    def count(self) -> int:
        """How many vectors there are."""

    def close(self) -> None:
        """Let go of files and locks; idempotent."""

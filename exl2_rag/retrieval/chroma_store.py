"""Vectors in Chroma: embedded in a directory of ours, or a server given by its URL.

Chroma embedded is not safe with several processes, so a directory is locked. Vectors are always ours: Chroma embeds
nothing, downloads nothing and sends no telemetry. No Chroma type leaves this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from exl2_rag.errors import RetrievalError, SettingsError
from exl2_rag.retrieval.embedding import Vectors
from exl2_rag.retrieval.lock import DirectoryLock
from exl2_rag.retrieval.store import Metadata

_T = TypeVar("_T")
COLLECTION = "chunks"
# Wider than Chroma's defaults, which lose neighbours where vectors do not cluster.
HNSW = {"space": "cosine", "ef_construction": 200, "ef_search": 200}


class ChromaStore:
    """A Chroma collection of vectors.

    Args:
        place: a directory, or the URL of a Chroma server ("http://host:8000").
        dimension: length of a vector.
        collection: its name; one for each index on a server.

    Raises:
        IndexLockedError: another process has the directory open.
        RetrievalError: the directory is damaged, the server does not answer, or vectors have another length.
    """

    def __init__(self, place: str | Path, *, dimension: int, collection: str = COLLECTION) -> None:
        self._dimension = dimension
        self._place = str(place)
        self._closed = False
        remote = urlsplit(self._place).scheme in ("http", "https")
        self._lock = None if remote else DirectoryLock(Path(place))
        try:
            self._client = _connect(self._place, remote)
            self._collection = self._client.get_or_create_collection(
                collection, embedding_function=None, configuration={"hnsw": HNSW}
            )
            self._batch_size = max(1, int(self._client.get_max_batch_size()))
        except SettingsError:
            self._release()
            raise
        except Exception as error:  # Chroma raises what its Rust core, SQLite or HTTP client raise
            self._release()
            raise RetrievalError(
                f"Chroma at {self._place} cannot be opened ({type(error).__name__}: {error}); "
                + ("check the server" if remote else "delete that directory, it is made again from the manifest")
            ) from error

    def upsert(self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata]) -> None:
        """Add vectors [n, dimension], or replace those of the same id."""
        if vectors.shape != (len(ids), self._dimension) or len(metadata) != len(ids):
            raise RetrievalError(
                f"expected {len(ids)} vectors of length {self._dimension} and as much metadata, "
                f"got {vectors.shape} and {len(metadata)}; the index was made with another embedder"
            )
        for rows in self._batches(range(len(ids))):
            self._collection.upsert(
                ids=[ids[row] for row in rows],
                embeddings=vectors[rows],
                metadatas=[dict(metadata[row]) for row in rows],
            )

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors; unknown ids are fine."""
        for part in self._batches(ids):
            known = self._collection.get(ids=part, include=[])["ids"]  # Chroma warns of unknown ones
            if known:
                self._collection.delete(ids=known)

    def query(self, vector: Vectors, k: int, where: Metadata | None = None) -> list[tuple[str, float]]:
        """The k nearest to `vector` [dimension] as (id, cosine similarity), best first."""
        k = min(k, self.count())
        if k == 0:
            return []
        found = self._collection.query(
            query_embeddings=vector[None, :], n_results=k, where=_condition(where), include=["distances"]
        )
        pairs = zip(found["ids"][0], found["distances"][0], strict=True)
        return sorted(
            ((identifier, 1.0 - float(distance)) for identifier, distance in pairs),
            key=lambda pair: (-pair[1], pair[0]),
        )

    def vectors(self, ids: Sequence[str]) -> dict[str, Vectors]:
        """The vectors [dimension] of those of these ids that are there."""
        held: dict[str, Vectors] = {}
        for part in self._batches(ids):
            found = self._collection.get(ids=part, include=["embeddings"])
            held.update(zip(found["ids"], np.asarray(found["embeddings"], dtype=np.float32), strict=True))
        return held

    def ids(self) -> set[str]:
        """All ids."""
        found: set[str] = set()
        while part := self._collection.get(include=[], limit=self._batch_size, offset=len(found))["ids"]:
            found.update(part)
        return found

    def count(self) -> int:
        """How many vectors there are."""
        return int(self._collection.count())

    def close(self) -> None:
        """Let go of the database and the lock; idempotent."""
        if not self._closed:
            self._closed = True
            self._client.close()
            # Chroma leaves the connections of its HTTP clients open; an embedded client has none.
            for client in (self._client, getattr(self._client, "_admin_client", None)):
                session = getattr(getattr(client, "_server", None), "_session", None)
                if session is not None:
                    session.close()
            self._release()

    def _batches(self, items: Sequence[_T]) -> Iterator[list[_T]]:
        for start in range(0, len(items), self._batch_size):
            yield list(items[start : start + self._batch_size])

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _connect(place: str, remote: bool) -> Any:
    import chromadb
    from chromadb.config import Settings

    settings = Settings(anonymized_telemetry=False)
    if not remote:
        return chromadb.PersistentClient(path=place, settings=settings)
    parts = urlsplit(place)
    if parts.hostname is None:
        raise SettingsError(f"expected the URL of a Chroma server such as http://localhost:8000, got {place!r}")
    secure = parts.scheme == "https"
    return chromadb.HttpClient(host=parts.hostname, port=parts.port or 8000, ssl=secure, settings=settings)


def _condition(where: Metadata | None) -> Any:
    """Several conditions must be joined by hand."""
    if not where:
        return None
    if len(where) == 1:
        return dict(where)
    return {"$and": [{key: value} for key, value in where.items()]}

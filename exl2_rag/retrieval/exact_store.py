"""Vectors in one numpy array, searched exhaustively: exact, and quick up to some 100,000 chunks.

Kept in one SQLite file, so that adding a few chunks writes a few rows, and a killed process leaves whole rows.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exl2_rag.errors import RetrievalError
from exl2_rag.retrieval.embedding import Vectors
from exl2_rag.retrieval.store import Metadata

FILE_NAME = "vectors.sqlite"
_SCHEMA = "CREATE TABLE IF NOT EXISTS vectors (id TEXT PRIMARY KEY, metadata TEXT NOT NULL, vector BLOB NOT NULL)"


class ExactStore:
    """An exact store, in memory and in one file.

    Args:
        directory: where the file is; None keeps everything in memory only.
        dimension: length of a vector.

    Raises:
        RetrievalError: the file cannot be read, or holds vectors of another length.
    """

    def __init__(self, directory: Path | None, *, dimension: int) -> None:
        self._dimension = dimension
        self._lock = threading.RLock()
        self._place = ":memory:" if directory is None else str(directory / FILE_NAME)
        try:
            self._database = sqlite3.connect(self._place, check_same_thread=False)
            with self._database:
                self._database.execute(_SCHEMA)
            self._rows: _Rows | None = self._read()
        except sqlite3.DatabaseError as error:
            raise RetrievalError(
                f"{self._place} cannot be read ({error}); delete that file, it is made again from the manifest"
            ) from error

    def upsert(self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata]) -> None:
        """Add vectors [n, dimension], or replace those of the same id."""
        if vectors.shape != (len(ids), self._dimension) or len(metadata) != len(ids):
            raise RetrievalError(
                f"expected {len(ids)} vectors of length {self._dimension} and as much metadata, "
                f"got {vectors.shape} and {len(metadata)}; the index was made with another embedder"
            )
        rows = [
            (identifier, json.dumps(dict(about)), np.ascontiguousarray(vector, dtype="<f4").tobytes())
            for identifier, about, vector in zip(ids, metadata, vectors, strict=True)
        ]
        with self._lock, self._database:
            self._database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
            self._rows = None

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors; unknown ids are fine."""
        with self._lock, self._database:
            self._database.executemany("DELETE FROM vectors WHERE id = ?", [(identifier,) for identifier in ids])
            self._rows = None

    def query(self, vector: Vectors, k: int, where: Metadata | None = None) -> list[tuple[str, float]]:
        """The k nearest to `vector` [dimension] as (id, cosine similarity), best first, ties by id."""
        rows = self._current()
        chosen = rows.matching(where)
        similarity = rows.matrix @ vector if where is None else rows.matrix[chosen] @ vector
        return [(rows.ids[chosen[i]], float(similarity[i])) for i in _largest(similarity, k)]

    def vectors(self, ids: Sequence[str]) -> dict[str, Vectors]:
        """The vectors [dimension] of those of these ids that are there."""
        rows = self._current()
        return {identifier: rows.matrix[rows.row_of[identifier]] for identifier in ids if identifier in rows.row_of}

    def ids(self) -> set[str]:
        """All ids."""
        return set(self._current().ids)

    def count(self) -> int:
        """How many vectors there are."""
        return len(self._current().ids)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _current(self) -> _Rows:
        with self._lock:
            if self._rows is None:
                self._rows = self._read()
            return self._rows

    def _read(self) -> _Rows:
        with closing(self._database.execute("SELECT id, metadata, vector FROM vectors ORDER BY id")) as cursor:
            found = cursor.fetchall()
        if any(len(vector) != 4 * self._dimension for _, _, vector in found):
            raise RetrievalError(
                f"{self._place} holds vectors of another length than {self._dimension}; the index was made with "
                "another embedder: delete that file, it is made again from the manifest"
            )
        return _Rows(found, self._dimension)


class _Rows:
    """The stored rows as arrays. Never modified, so a query may go on while the store changes."""

    def __init__(self, rows: Sequence[tuple[str, str, bytes]], dimension: int) -> None:
        self.ids = [row[0] for row in rows]
        self.row_of = {identifier: row for row, identifier in enumerate(self.ids)}
        self.metadata: list[Metadata] = [json.loads(row[1]) for row in rows]
        joined = b"".join(row[2] for row in rows)
        self.matrix: Vectors = np.frombuffer(joined, dtype="<f4").astype(np.float32).reshape(len(rows), dimension)

    def matching(self, where: Metadata | None) -> NDArray[np.intp]:
        """Rows whose metadata has all of these values."""
        if where is None:
            return np.arange(len(self.ids))
        wanted = where.items()
        return np.array([row for row, held in enumerate(self.metadata) if wanted <= held.items()], dtype=np.intp)


def _largest(values: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Indexes of the k largest values, largest first, ties by index."""
    if k < len(values):
        threshold = np.partition(values, len(values) - k)[len(values) - k]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:k]

"""Vectors in one numpy array, searched exhaustively: exact, and quick up to some 100,000 chunks."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exl2_rag.errors import RetrievalError
from exl2_rag.retrieval.embedding import Vectors
from exl2_rag.retrieval.store import Metadata

FILE_NAME = "vectors.npz"


class ExactStore:
    """An exact store in memory, kept in one file.

    Args:
        directory: where the file is; None keeps everything in memory only.
        dimension: length of a vector.

    Raises:
        RetrievalError: the file cannot be read, or holds vectors of another length.
    """

    def __init__(self, directory: Path | None, *, dimension: int) -> None:
        self._path = None if directory is None else directory / FILE_NAME
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._vectors: Vectors = np.zeros((0, dimension), dtype=np.float32)
        self._metadata: list[Metadata] = []
        self._dirty = False
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def upsert(self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata]) -> None:
        """Add vectors [n, dimension], or replace those of the same id."""
        if vectors.shape != (len(ids), self._vectors.shape[1]) or len(metadata) != len(ids):
            raise RetrievalError(
                f"expected {len(ids)} vectors of length {self._vectors.shape[1]} and as much metadata, "
                f"got {vectors.shape} and {len(metadata)}; the index was made with another embedder"
            )
        new = []
        for i, identifier in enumerate(ids):
            if (row := self._rows.get(identifier)) is not None:
                self._vectors[row] = vectors[i]
                self._metadata[row] = metadata[i]
            else:
                self._rows[identifier] = len(self._ids)
                self._ids.append(identifier)
                self._metadata.append(metadata[i])
                new.append(i)
        self._vectors = np.concatenate([self._vectors, vectors[new].astype(np.float32)])
        self._dirty = True

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors; unknown ids are fine."""
        gone = {self._rows[identifier] for identifier in ids if identifier in self._rows}
        if not gone:
            return
        kept = [row for row in range(len(self._ids)) if row not in gone]
        self._ids = [self._ids[row] for row in kept]
        self._metadata = [self._metadata[row] for row in kept]
        self._vectors = self._vectors[kept]
        self._rows = {identifier: row for row, identifier in enumerate(self._ids)}
        self._dirty = True

    def query(self, vector: Vectors, k: int, where: Metadata | None = None) -> list[tuple[str, float]]:
        """The k nearest to `vector` [dimension] as (id, cosine similarity), best first."""
        if where is None:
            rows = np.arange(len(self._ids))
        else:
            wanted = where.items()
            rows = np.array([row for row, held in enumerate(self._metadata) if wanted <= held.items()], dtype=np.int64)
        similarity = self._vectors[rows] @ vector
        best = np.argsort(-similarity, kind="stable")[:k]
        return [(self._ids[rows[i]], float(similarity[i])) for i in best]

    def ids(self) -> set[str]:
        """All ids."""
        return set(self._ids)

    def count(self) -> int:
        """How many vectors there are."""
        return len(self._ids)

    def flush(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None or not self._dirty:
            return
        temporary = self._path.with_name(FILE_NAME + ".new")
        with temporary.open("wb") as file:
            metadata = json.dumps([dict(one) for one in self._metadata])
            np.savez(file, vectors=self._vectors, ids=np.array(json.dumps(self._ids)), metadata=np.array(metadata))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._dirty = False

    def close(self) -> None:
        """Write what is not yet written."""
        self.flush()

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                vectors = held["vectors"]
                ids, metadata = json.loads(str(held["ids"])), json.loads(str(held["metadata"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise RetrievalError(f"{path} cannot be read ({error}); delete the index and make it again") from error
        if vectors.shape != (len(ids), self._vectors.shape[1]) or len(metadata) != len(ids):
            raise RetrievalError(
                f"{path} holds vectors of shape {vectors.shape} for {len(ids)} chunks, expected length "
                f"{self._vectors.shape[1]}; delete the index and make it again"
            )
        self._vectors, self._ids, self._metadata = vectors.astype(np.float32), ids, metadata
        self._rows = {identifier: row for row, identifier in enumerate(ids)}

"""The index's book-keeping in one SQLite file: what is indexed, as which text, in which chunks, under which labels.

The manifest is the truth. Vectors and BM25 are made from it and can be made again: `generation` counts its changes so
that BM25 knows when it is stale, and `dirty` says that a change of the vector store was begun and not finished.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from exl2_rag.errors import IndexNotFoundError, RetrievalError
from exl2_rag.retrieval.chunking import ChunkSpan
from exl2_rag.retrieval.document import Chunk, Document, Markup

SCHEMA_VERSION = "1"
Origin = Literal["file", "added"]

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sources (
    source TEXT PRIMARY KEY,
    origin TEXT NOT NULL,          -- "file": mirrored from a directory; "added": given as a document
    content_hash TEXT NOT NULL,    -- of the file's bytes
    pipeline_hash TEXT NOT NULL,   -- of everything that turns bytes into chunks and vectors
    title TEXT NOT NULL,
    media_type TEXT NOT NULL,
    markup TEXT NOT NULL,
    page_starts TEXT NOT NULL,     -- JSON list
    text TEXT NOT NULL             -- cleaned; all offsets refer to it
);
CREATE TABLE chunks (
    chunk_id TEXT PRIMARY KEY,
    label INTEGER NOT NULL UNIQUE, -- shown as "d<label>"
    source TEXT NOT NULL REFERENCES sources (source) ON DELETE CASCADE,
    ordinal INTEGER NOT NULL,
    heading TEXT NOT NULL,
    start INTEGER NOT NULL,
    end INTEGER NOT NULL,
    page INTEGER
);
CREATE INDEX chunks_by_source ON chunks (source, ordinal);
"""
_CHUNK_COLUMNS = "c.chunk_id, c.label, c.source, s.title, c.heading, c.start, c.end, c.page"
_SQLITE_VARIABLES = 500  # names in one IN (...)


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """A document with its chunks, ready to be written.

    Attributes:
        document: cleaned.
        chunks: (chunk id, span) in order.
    """

    document: Document
    content_hash: str
    pipeline_hash: str
    origin: Origin
    chunks: tuple[tuple[str, ChunkSpan], ...]


@dataclass(frozen=True, slots=True)
class SourceState:
    """What of a source decides whether it must be indexed again."""

    content_hash: str
    pipeline_hash: str
    origin: Origin


class Manifest:
    """An open manifest; made by `create` or `open`. Safe for threads of one process."""

    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self._database = database
        self._path = path
        self._lock = threading.RLock()

    @classmethod
    def create(cls, path: Path, *, embedder_id: str, store: str, chunk_tokens: int) -> Manifest:
        """A new, empty manifest with a delimiter and an identity of its own."""
        fresh = path.with_name(path.name + ".new")
        fresh.unlink(missing_ok=True)
        with closing(sqlite3.connect(fresh)) as database, database:
            database.executescript(_SCHEMA)
            values = {
                "schema": SCHEMA_VERSION,
                "index_id": secrets.token_hex(8),
                "delimiter": secrets.token_hex(4),
                "embedder_id": embedder_id,
                "store": store,
                "chunk_tokens": str(chunk_tokens),
                "next_label": "1",
                "generation": "0",
                "dirty": "0",
            }
            database.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
        fresh.rename(path)  # a manifest is there whole or not at all
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Manifest:
        """Open an existing manifest.

        Raises:
            IndexNotFoundError: there is none.
            RetrievalError: it is damaged or of another version.
        """
        if not path.is_file():
            raise IndexNotFoundError(f"there is no index at {path.parent}; make one with: exl2-rag index DIRECTORY")
        try:
            database = sqlite3.connect(path, check_same_thread=False)
            database.execute("PRAGMA foreign_keys = ON")
            found = database.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        except sqlite3.DatabaseError as error:
            raise RetrievalError(f"{path} is damaged ({error}); delete {path.parent} and index again") from error
        if found is None or found[0] != SCHEMA_VERSION:
            database.close()
            raise RetrievalError(
                f"{path} was written by another version (schema {found and found[0]}, expected {SCHEMA_VERSION}); "
                f"delete {path.parent} and index again"
            )
        return cls(database, path)

    def close(self) -> None:
        """Close the file; idempotent."""
        with self._lock:
            self._database.close()

    def get(self, key: str) -> str:
        """A value of the index as a whole: index_id, delimiter, embedder_id, store, chunk_tokens, generation."""
        with self._lock:
            row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise RetrievalError(f"{self._path} has no {key}; delete {self._path.parent} and index again")
        return str(row[0])

    def put(self, key: str, value: str) -> None:
        """Change such a value."""
        with self._lock, self._database:
            self._database.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))

    @property
    def generation(self) -> int:
        """Grows with every change of the chunks."""
        return int(self.get("generation"))

    @property
    def dirty(self) -> bool:
        """Was a change of the vector store begun and not finished?"""
        return self.get("dirty") == "1"

    def mark_dirty(self) -> None:
        """On disk before the first change of the vector store."""
        self.put("dirty", "1")

    def mark_clean(self) -> None:
        """After the last change of the vector store."""
        self.put("dirty", "0")

    def replace(self, prepared: Iterable[PreparedSource]) -> list[str]:
        """Write documents with their chunks in one transaction, in place of what their sources held.

        A chunk whose id was there keeps its label; a new one gets the next label, which is never given again.

        Returns:
            Ids of chunks that are no longer in the index.
        """
        gone: list[str] = []
        with self._lock, self._database:
            next_label = int(self.get("next_label"))
            for source in prepared:
                before = self._labels(source.document.source)
                self._delete(source.document.source)
                self._insert_source(source)
                rows = []
                for ordinal, (chunk_id, span) in enumerate(source.chunks):
                    label = before.pop(chunk_id, None)
                    if label is None:
                        label, next_label = next_label, next_label + 1
                    place = (span.heading, span.start, span.end, span.page)
                    rows.append((chunk_id, label, source.document.source, ordinal, *place))
                self._database.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
                gone.extend(before)
            self._database.execute("UPDATE meta SET value = ? WHERE key = 'next_label'", (str(next_label),))
            self._next_generation()
        return gone

    def remove(self, sources: Iterable[str]) -> list[str]:
        """Remove documents in one transaction; returns the ids of their chunks."""
        gone: list[str] = []
        with self._lock, self._database:
            for source in sources:
                gone.extend(self._labels(source))
                self._delete(source)
            self._next_generation()
        return gone

    def sources(self) -> dict[str, SourceState]:
        """All sources in order of name."""
        query = "SELECT source, content_hash, pipeline_hash, origin FROM sources ORDER BY source"
        return {row[0]: SourceState(row[1], row[2], cast(Origin, row[3])) for row in self._rows(query)}

    def document(self, source: str) -> Document:
        """A document as it was indexed.

        Raises:
            RetrievalError: there is no such source.
        """
        query = "SELECT title, text, media_type, page_starts, markup FROM sources WHERE source = ?"
        rows = self._rows(query, (source,))
        if not rows:
            raise RetrievalError(f"the index holds no document {source!r}")
        title, text, media_type, page_starts, markup = rows[0]
        return Document(source, title, text, media_type, tuple(json.loads(page_starts)), cast(Markup, markup))

    def chunks(self, chunk_ids: Sequence[str]) -> dict[str, Chunk]:
        """The chunks of these ids that are in the index."""
        found: dict[str, Chunk] = {}
        for start in range(0, len(chunk_ids), _SQLITE_VARIABLES):
            some = chunk_ids[start : start + _SQLITE_VARIABLES]
            marks = ", ".join("?" * len(some))
            for chunk in self._select_chunks(f"c.chunk_id IN ({marks})", some):
                found[chunk.chunk_id] = chunk
        return found

    def chunk_of_label(self, label: str) -> Chunk | None:
        """The chunk shown as `label`, such as "d17"."""
        number = label.removeprefix("d")
        if not number.isdecimal() or label == number:
            return None
        return next(iter(self._select_chunks("c.label = ?", (int(number),))), None)

    def chunks_of(self, source: str) -> list[Chunk]:
        """All chunks of one document in order."""
        document = self.document(source)
        rows = self._rows(
            f"SELECT {_CHUNK_COLUMNS} FROM chunks c JOIN sources s USING (source) "
            "WHERE c.source = ? ORDER BY c.ordinal",
            (source,),
        )
        return [_chunk(row, document.text[row[5] : row[6]]) for row in rows]

    def all_chunks(self) -> Iterator[Chunk]:
        """Every chunk, by source and place."""
        for source in self.sources():
            yield from self.chunks_of(source)

    def chunk_ids(self) -> set[str]:
        """Ids of all chunks."""
        return {row[0] for row in self._rows("SELECT chunk_id FROM chunks")}

    def n_chunks(self) -> int:
        """How many chunks there are."""
        return int(self._rows("SELECT count(*) FROM chunks")[0][0])

    def _select_chunks(self, condition: str, values: Sequence[Any]) -> list[Chunk]:
        # substr counts characters from 1, as Python's slices count them from 0; the text holds no NUL.
        rows = self._rows(
            f"SELECT {_CHUNK_COLUMNS}, substr(s.text, c.start + 1, c.end - c.start) "
            f"FROM chunks c JOIN sources s USING (source) WHERE {condition}",
            values,
        )
        return [_chunk(row, row[8]) for row in rows]

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, closing(self._database.execute(query, tuple(values))) as cursor:
            return cursor.fetchall()

    def _labels(self, source: str) -> dict[str, int]:
        return dict(self._rows("SELECT chunk_id, label FROM chunks WHERE source = ?", (source,)))

    def _delete(self, source: str) -> None:
        self._database.execute("DELETE FROM chunks WHERE source = ?", (source,))
        self._database.execute("DELETE FROM sources WHERE source = ?", (source,))

    def _insert_source(self, source: PreparedSource) -> None:
        document = source.document
        self._database.execute(
            "INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                document.source,
                source.origin,
                source.content_hash,
                source.pipeline_hash,
                document.title,
                document.media_type,
                document.markup,
                json.dumps(list(document.page_starts)),
                document.text,
            ),
        )

    def _next_generation(self) -> None:
        self._database.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'generation'")


def _chunk(row: Sequence[Any], text: str) -> Chunk:
    chunk_id, label, source, title, heading, start, end, page = row[:8]
    return Chunk(chunk_id, f"d{label}", source, title, heading, text, start, end, page)

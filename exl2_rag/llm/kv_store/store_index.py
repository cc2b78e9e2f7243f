"""The index of a store in one SQLite file: which page lies where, what it is worth, and which sources it was made from.

One process writes; others may read at the same time (write-ahead log). Rows are written only after their bytes are on
the disk, and rows go before bytes are erased, so whatever moment a process is killed at, a row never points at bytes
that were not written for it. Were it to, the checks at reading would find out.

A page's priority follows GreedyDual-Size-Frequency: the clock plus the seconds it saves, times its decayed uses, by its
bytes. The leaf of least priority goes first and moves the clock up to its own priority, so that pages that were once
worth much, and are not used any more, age.
"""

from __future__ import annotations

import sqlite3
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2_rag.llm.kv_store.page_store import PageName, PageRecord

SCHEMA_VERSION = 1
HITS_HALF_LIFE_S = 3 * 24 * 3600.0
MAX_SEEN = 65536
"""Pages used once and not stored that are remembered, so that their second use is known for one."""

_SCHEMA = """
CREATE TABLE pages (
    key BLOB PRIMARY KEY,
    parent BLOB NOT NULL,          -- key of the page before, or the root
    root BLOB NOT NULL,            -- where the chain begins: identity and tenant
    token_ids BLOB NOT NULL,       -- uint32, little endian
    segment INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    nbytes INTEGER NOT NULL,       -- of the image
    checksum BLOB NOT NULL,        -- XXH3-128 of the image
    recompute_s REAL NOT NULL,
    hits REAL NOT NULL,            -- uses, halved every three days
    last_used REAL NOT NULL,       -- seconds since 1970
    priority REAL NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX pages_by_parent ON pages (parent);
CREATE INDEX pages_by_priority ON pages (priority);
CREATE INDEX pages_by_place ON pages (segment, offset);
CREATE TABLE tags (source TEXT NOT NULL, key BLOB NOT NULL, PRIMARY KEY (source, key)) WITHOUT ROWID;
CREATE INDEX tags_by_key ON tags (key);
CREATE TABLE seen (key BLOB PRIMARY KEY, last_used REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""
_VARIABLES = 500  # names in one IN (...)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page's record lies, and the checksum of its image."""

    segment: int
    offset: int
    image_bytes: int
    checksum: bytes


@dataclass(frozen=True, slots=True)
class IndexedPage:
    """A row of the index, as far as reading needs it."""

    name: PageName
    place: Place
    recompute_s: float


class StoreIndex:
    """An open index. Safe for threads, which take turns.

    Args:
        read_only: another process writes.

    Raises:
        sqlite3.Error: the file is damaged, of another version, or cannot be opened.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._lock = threading.RLock()
        is_new = not path.exists()
        mode = "ro" if read_only else "rwc"
        self._database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            check_same_thread=False,
            timeout=5,
            isolation_level=None,
        )
        try:
            self._open(is_new=is_new and not read_only, read_only=read_only)
        except BaseException:
            self._database.close()
            raise

    def _open(self, *, is_new: bool, read_only: bool) -> None:
        if not read_only:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("PRAGMA secure_delete = ON")  # token ids of purged pages must not stay in the file
        if is_new:
            with self._transaction():
                for statement in _SCHEMA.split(";"):
                    self._database.execute(statement)
                values = [("schema", SCHEMA_VERSION), ("clock", 0.0), ("next_segment", 1), ("erase", 0)]
                self._database.executemany("INSERT INTO meta VALUES (?, ?)", values)
        schema = self._meta("schema")
        if schema != SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"the index has schema {schema!r}, expected {SCHEMA_VERSION}")
        if not read_only:
            problem = self._rows("PRAGMA quick_check(1)")[0][0]
            if problem != "ok":
                raise sqlite3.DatabaseError(str(problem))

    def close(self) -> None:
        """Close the file; idempotent."""
        with self._lock:
            self._database.close()

    # --- reading -----------------------------------------------------------------------------------------------------

    def find(self, keys: Seq[bytes]) -> dict[bytes, IndexedPage]:
        """The rows of these keys; rows that make no sense are left out."""
        found: dict[bytes, IndexedPage] = {}
        columns = "key, parent, token_ids, segment, offset, nbytes, checksum, recompute_s"
        for marks, some in _in_parts(keys):
            for row in self._rows(f"SELECT {columns} FROM pages WHERE key IN ({marks})", some):
                page = _indexed_page(row)
                if page is not None:
                    found[page.name.key] = page
        return found

    def contains(self, keys: Seq[bytes]) -> set[bytes]:
        """Which of these have a row."""
        return {
            row[0]
            for marks, some in _in_parts(keys)
            for row in self._rows(f"SELECT key FROM pages WHERE key IN ({marks})", some)
        }

    def following(self, parent_key: bytes, limit: int) -> list[tuple[int, ...]]:
        """Token ids of pages that follow a page, the last used first."""
        query = "SELECT token_ids FROM pages WHERE parent = ? ORDER BY last_used DESC LIMIT ?"
        return [_decode_tokens(row[0]) for row in self._rows(query, (parent_key, limit)) if len(row[0]) % 4 == 0]

    def n_pages(self) -> int:
        """Rows."""
        return int(self._rows("SELECT count(*) FROM pages")[0][0])

    def pages(self, segment: int | None = None) -> list[IndexedPage]:
        """Every row that makes sense, or those of one segment, by place."""
        columns = "key, parent, token_ids, segment, offset, nbytes, checksum, recompute_s"
        where, values = ("", ()) if segment is None else ("WHERE segment = ?", (segment,))
        rows = self._rows(f"SELECT {columns} FROM pages {where} ORDER BY segment, offset", values)
        return [page for page in map(_indexed_page, rows) if page is not None]

    def keys(self) -> list[bytes]:
        """Keys of all rows."""
        return [row[0] for row in self._rows("SELECT key FROM pages")]

    def sources(self) -> dict[str, int]:
        """Pages by source."""
        return {row[0]: row[1] for row in self._rows("SELECT source, count(*) FROM tags GROUP BY source")}

    def sources_of(self, keys: Seq[bytes]) -> dict[bytes, frozenset[str]]:
        """Sources by page, for pages that have any."""
        found: dict[bytes, frozenset[str]] = {}
        for marks, some in _in_parts(keys):
            for key, source in self._rows(f"SELECT key, source FROM tags WHERE key IN ({marks})", some):
                found[key] = found.get(key, frozenset()) | {source}
        return found

    def seen(self) -> list[bytes]:
        """Keys that were used once and not stored, the longest ago first."""
        return [row[0] for row in self._rows("SELECT key FROM seen ORDER BY last_used")]

    def tagged(self, source: str) -> list[bytes]:
        """Keys of the pages made from a source."""
        return [row[0] for row in self._rows("SELECT key FROM tags WHERE source = ?", (source,))]

    def of_root(self, root_key: bytes) -> list[bytes]:
        """Keys of all chains that begin there."""
        return [row[0] for row in self._rows("SELECT key FROM pages WHERE root = ?", (root_key,))]

    def with_descendants(self, keys: Seq[bytes]) -> list[bytes]:
        """These keys and those of all pages that follow them, parents before their children."""
        order: dict[bytes, None] = dict.fromkeys(self.contains(keys))
        front = list(order)
        while front:
            children = [
                row[0]
                for marks, some in _in_parts(front)
                for row in self._rows(f"SELECT key FROM pages WHERE parent IN ({marks})", some)
            ]
            front = [key for key in children if key not in order]
            for key in children:  # a page may be named before one that it follows
                order.pop(key, None)
                order[key] = None
        return list(order)

    def victims(self, limit: int, protected: Iterable[bytes] = ()) -> list[tuple[bytes, float]]:
        """Up to `limit` leaves of least priority, as (key, priority); pinned and protected ones are left out."""
        kept = set(protected)
        rows = self._rows(
            "SELECT key, priority FROM pages p WHERE pinned = 0 "
            "AND NOT EXISTS (SELECT 1 FROM pages c WHERE c.parent = p.key) ORDER BY priority, last_used LIMIT ?",
            (limit + len(kept),),
        )
        return [(row[0], row[1]) for row in rows if row[0] not in kept][:limit]

    def is_erasure_due(self) -> bool:
        """Whether pages were purged whose bytes may still be in the segments."""
        return bool(self._meta("erase"))

    # --- writing -----------------------------------------------------------------------------------------------------

    def insert(self, records: Seq[tuple[PageRecord, Place]], now: float | None = None) -> None:
        """Add rows in one transaction. Their bytes must be on the disk."""
        now = time.time() if now is None else now
        with self._transaction():
            clock = float(self._meta("clock"))
            for record, place in records:
                priority = clock + _worth(record.recompute_s, 1.0, place.image_bytes)
                token_ids = _encode_tokens(record.name.token_ids)
                self._database.execute(
                    "INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        record.name.key,
                        record.name.parent_key,
                        record.root_key,
                        token_ids,
                        place.segment,
                        place.offset,
                        place.image_bytes,
                        place.checksum,
                        record.recompute_s,
                        1.0,
                        now,
                        priority,
                        int(record.is_pinned),
                    ),
                )
                self._tag(record.name.key, record.sources)
            self._database.executemany("DELETE FROM seen WHERE key = ?", [(one.name.key,) for one, _ in records])

    def tag(self, keys: Iterable[bytes], sources: Seq[str]) -> None:
        """Note that stored pages were used with these sources, too."""
        with self._transaction():
            for key in self.contains(list(keys)):
                self._tag(key, sources)

    def touch(self, keys: Seq[bytes], now: float | None = None) -> None:
        """Count a use of each page."""
        now = time.time() if now is None else now
        with self._transaction():
            clock = float(self._meta("clock"))
            for marks, some in _in_parts(keys):
                rows = self._rows(
                    "SELECT key, CAST(hits AS REAL), CAST(last_used AS REAL), CAST(recompute_s AS REAL), nbytes "
                    f"FROM pages WHERE key IN ({marks})",
                    some,
                )
                for key, hits, last_used, recompute_s, nbytes in rows:
                    new_hits = hits * 0.5 ** (max(0.0, now - last_used) / HITS_HALF_LIFE_S) + 1.0
                    self._database.execute(
                        "UPDATE pages SET hits = ?, last_used = ?, priority = ? WHERE key = ?",
                        (new_hits, now, clock + _worth(recompute_s, new_hits, nbytes), key),
                    )

    def note_seen(self, keys: Iterable[bytes], now: float | None = None) -> None:
        """Remember pages that were used once and not stored."""
        now = time.time() if now is None else now
        with self._transaction():
            self._database.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?)", [(key, now) for key in keys])
            surplus = int(self._rows("SELECT count(*) FROM seen")[0][0]) - MAX_SEEN
            if surplus > 0:
                self._database.execute(
                    "DELETE FROM seen WHERE key IN (SELECT key FROM seen ORDER BY last_used LIMIT ?)", (surplus,)
                )

    def set_pinned(self, keys: Seq[bytes], *, pinned: bool) -> None:
        """Exempt pages from eviction, or no longer."""
        with self._transaction():
            for marks, some in _in_parts(keys):
                self._database.execute(f"UPDATE pages SET pinned = {int(pinned)} WHERE key IN ({marks})", some)

    def unpin_all(self) -> None:
        """Pins end with the process that set them."""
        with self._transaction():
            self._database.execute("UPDATE pages SET pinned = 0 WHERE pinned != 0")

    def move(self, places: Iterable[tuple[bytes, int, int]]) -> None:
        """Let rows, given as (key, segment, offset), point at copies of their records."""
        with self._transaction():
            self._database.executemany(
                "UPDATE pages SET segment = ?, offset = ? WHERE key = ?",
                [(segment, offset, key) for key, segment, offset in places],
            )

    def orphans(self) -> list[bytes]:
        """Keys of pages whose parent has no row and is not where their chain begins."""
        return [
            row[0]
            for row in self._rows(
                "SELECT key FROM pages p WHERE parent != root "
                "AND NOT EXISTS (SELECT 1 FROM pages q WHERE q.key = p.parent)"
            )
        ]

    def delete(
        self, keys: Seq[bytes], *, erase: bool = False, clock: float | None = None
    ) -> list[tuple[int, int, int]]:
        """Remove rows in one transaction.

        Args:
            erase: note that their bytes must be erased, until `note_erased`.
            clock: the new time of eviction's clock.

        Returns:
            (segment, offset, image bytes) of each.
        """
        places: list[tuple[int, int, int]] = []
        with self._transaction():
            for marks, some in _in_parts(keys):
                places += self._rows(f"SELECT segment, offset, nbytes FROM pages WHERE key IN ({marks})", some)
                self._database.execute(f"DELETE FROM tags WHERE key IN ({marks})", some)
                self._database.execute(f"DELETE FROM pages WHERE key IN ({marks})", some)
                if erase:
                    self._database.execute(f"DELETE FROM seen WHERE key IN ({marks})", some)
            if erase:
                self._database.execute("UPDATE meta SET value = 1 WHERE key = 'erase'")
            if clock is not None:
                self._database.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'clock'", (clock,))
        return places

    def note_erased(self) -> None:
        """No segment holds bytes of purged pages any more. Empties the log, too, which may still hold their rows."""
        with self._transaction():
            self._database.execute("UPDATE meta SET value = 0 WHERE key = 'erase'")
        self._rows("PRAGMA wal_checkpoint(TRUNCATE)")

    def take_segment_number(self) -> int:
        """A number no segment of this store ever had."""
        with self._transaction():
            number = int(self._meta("next_segment"))
            self._database.execute("UPDATE meta SET value = ? WHERE key = 'next_segment'", (number + 1,))
        return number

    # --- inside ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and one thread at a time. A transaction inside another is part of it."""
        with self._lock:
            if self._database.in_transaction:
                yield
                return
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                self._database.rollback()  # harmless where SQLite has done so by itself
                raise

    def _tag(self, key: bytes, sources: Seq[str]) -> None:
        self._database.executemany("INSERT OR IGNORE INTO tags VALUES (?, ?)", [(source, key) for source in sources])

    def _meta(self, key: str) -> Any:
        rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        if not rows:
            raise sqlite3.DatabaseError(f"the index lacks its {key}")
        return rows[0][0]

    def _rows(self, query: str, values: Seq[Any] = ()) -> list[Any]:
        with self._lock, closing(self._database.execute(query, tuple(values))) as cursor:
            return cursor.fetchall()


def _worth(recompute_s: float, hits: float, image_bytes: int) -> float:
    """Seconds saved by a MiB."""
    return recompute_s * hits / max(image_bytes, 1) * 2**20


def _encode_tokens(token_ids: Seq[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def _decode_tokens(blob: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(blob) // 4}I", blob)


def _indexed_page(row: Seq[Any]) -> IndexedPage | None:
    """A row as it was written; None if its values are of other kinds than those that are written."""
    key, parent, token_ids, segment, offset, nbytes, checksum, recompute_s = row
    blobs_fit = all(isinstance(one, bytes) for one in (key, parent, token_ids, checksum))
    if not blobs_fit or not all(isinstance(one, int) for one in (segment, offset, nbytes)):
        return None
    if len(token_ids) % 4 or not isinstance(recompute_s, float):
        return None
    return IndexedPage(
        PageName(key, parent, _decode_tokens(token_ids)), Place(segment, offset, nbytes, checksum), recompute_s
    )


def _in_parts(keys: Seq[bytes]) -> Iterator[tuple[str, Seq[bytes]]]:
    """Question marks and values for `IN (...)`, a part of the keys at a time."""
    for start in range(0, len(keys), _VARIABLES):
        some = keys[start : start + _VARIABLES]
        yield ", ".join("?" * len(some)), some

"""`PageStore` on disk: survives a restart and a kill at any moment, and never gives bytes it is not sure of.

A page is given out only if its row has the key, the parent and every token that were asked for, its record's header
has the same key, and the checksum of its bytes agrees with both. Anything else is a miss; a row that lied is deleted.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TypeVar

from exl2_rag.errors import KVStoreError, SettingsError
from exl2_rag.llm.kv_store.page_store import PageName, PageRecord, PageStore, StoreReport
from exl2_rag.llm.kv_store.segment import SegmentReader, record_bytes
from exl2_rag.llm.kv_store.store_directory import (
    INDEX_NAME,
    StoreIdentity,
    WriterLock,
    clear_folder,
    folder_bytes,
    make_folder,
    make_room_beside,
    prepare_folder,
    read_manifest,
)
from exl2_rag.llm.kv_store.store_index import IndexedPage, StoreIndex
from exl2_rag.llm.kv_store.store_writer import StoreWriter

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)

DEFAULT_QUOTA_BYTES = 8 * 2**30
LEAST_RECORDS = 16
"""A store too small for this many pages would be busy evicting."""
READ_AHEAD_RECORDS = 4
CLOSE_TIMEOUT_S = 30.0


class DiskStore(PageStore):
    """The store of one identity. Reading is for one thread at a time; what writes may be called from any.

    Args:
        directory: of the store; each identity has a folder of its own in it.
        identity: of the model and its cache.
        quota_bytes: what the directory may take on the disk, other identities' folders included.

    Raises:
        KVStoreError: the directory cannot be made or written to.
        SettingsError: the quota is too small for this model's pages.
    """

    def __init__(self, directory: Path, identity: StoreIdentity, quota_bytes: int = DEFAULT_QUOTA_BYTES) -> None:
        least = LEAST_RECORDS * record_bytes(identity.image_bytes)
        if quota_bytes < least:
            raise SettingsError(
                f"kv_store_bytes must be at least {least} for this model ({LEAST_RECORDS} pages of "
                f"{identity.image_bytes} bytes), got {quota_bytes}"
            )
        self.identity = identity
        self.folder = make_folder(directory, identity)
        self.quota_bytes = quota_bytes
        self.n_damaged = 0
        self.read_pages = 0
        self.read_s = 0.0
        self._off_because: str | None = None
        self._writer: StoreWriter | None = None
        self._index: StoreIndex | None = None  # of the reading thread
        self._lock = WriterLock(self.folder)
        self._reading = threading.RLock()
        self._reader = SegmentReader(self.folder, identity.image_bytes)
        if self._lock.acquire():
            try:
                self._open_for_writing(directory)
            except BaseException:
                self._lock.release()
                raise
        else:
            self._open_for_reading()

    @property
    def is_writing(self) -> bool:
        """Whether new pages are kept."""
        return self._writer is not None and self._writer.off_because is None

    @property
    def has_room(self) -> bool:
        """Whether a page would be accepted now."""
        return self._writer is not None and self._writer.has_room

    @property
    def read_bytes(self) -> int:
        """Bytes of the pages that were given out."""
        return self.read_pages * self.identity.image_bytes

    def on_room(self, action: Callable[[], None]) -> None:
        """Have `action` called, by another thread, when there is room again."""
        if self._writer is not None:
            self._writer.on_room = action

    # --- reading -----------------------------------------------------------------------------------------------------

    def contains(self, keys: Seq[bytes]) -> set[bytes]:
        """Which of these have a row."""
        return self._read(lambda index: index.contains(keys), set())

    def find(self, keys: Seq[bytes]) -> dict[bytes, IndexedPage]:
        """Their rows."""
        return self._read(lambda index: index.find(keys), {})

    def following(self, parent_key: bytes, limit: int) -> list[tuple[int, ...]]:
        """Token ids of pages that follow a page, the last used first."""
        return self._read(lambda index: index.following(parent_key, limit), [])

    def sources_of(self, keys: Seq[bytes]) -> dict[bytes, frozenset[str]]:
        """The sources of stored pages that have any."""
        return self._read(lambda index: index.sources_of(keys), {})

    def seen(self) -> list[bytes]:
        """Keys of pages that were used once and not stored, by this process or an earlier one."""
        return self._read(lambda index: index.seen(), [])

    def get_many(self, names: Seq[PageName]) -> Iterator[memoryview]:
        """The images of a chain's pages in order, up to the first that is missing or not sound.

        Each image is valid until the next one is asked for.
        """
        rows = self.find([name.key for name in names])
        places = [(row.place.segment, row.place.offset) for name in names if (row := rows.get(name.key)) is not None]
        for number, name in enumerate(names):
            row = rows.get(name.key)
            if row is None:
                return
            if row.name != name:
                self._discard(name)
                return
            started = time.perf_counter()
            image = self._image(row, places[number + 1 : number + 1 + READ_AHEAD_RECORDS])
            if image is None:
                return
            self.read_s += time.perf_counter() - started
            self.read_pages += 1
            yield image

    # --- writing -----------------------------------------------------------------------------------------------------

    def put_many(self, records: Seq[PageRecord]) -> int:
        """Queue pages, parents before their children; returns how many were accepted."""
        return 0 if self._writer is None else self._writer.put(records)

    def touch(self, keys: Seq[bytes]) -> None:
        """Count a use of stored pages."""
        self._later(lambda index: index.touch(keys))

    def tag(self, keys: Seq[bytes], sources: Seq[str]) -> None:
        """Note sources of stored pages."""
        self._later(lambda index: index.tag(keys, sources))

    def note_seen(self, keys: Seq[bytes]) -> None:
        """Remember a first use of pages that are not stored."""
        self._later(lambda index: index.note_seen(keys))

    def set_pinned(self, keys: Seq[bytes], *, pinned: bool) -> None:
        """Exempt pages from eviction as long as this process lives, or no longer."""
        self._later(lambda index: index.set_pinned(keys, pinned=pinned))

    def evict(self, keys: Seq[bytes]) -> int:
        """Drop pages and what follows them; returns how many are gone."""
        return 0 if self._writer is None else self._writer.evict(keys)

    def purge(self, source: str) -> int:
        """Erase every page made from a source, and what follows it; returns how many pages are gone.

        Raises:
            KVStoreError: another process writes to the store, or it cannot be written to.
        """
        return self._purge(lambda index: index.tagged(source), f"the pages of {source!r}")

    def purge_all(self, sources: Seq[str]) -> int:
        """`purge` of several sources at once.

        Raises:
            KVStoreError: as for `purge`.
        """
        return self._purge(
            lambda index: [key for source in sources for key in index.tagged(source)], f"the pages of {sources!r:.200}"
        )

    def purge_root(self, root_key: bytes) -> int:
        """Erase every page whose chain begins there (a tenant's); returns how many are gone.

        Raises:
            KVStoreError: as for `purge`.
        """
        return self._purge(lambda index: index.of_root(root_key), "a tenant's pages")

    def flush(self) -> None:
        """Wait until everything put so far is on the disk, or writing has stopped."""
        if self._writer is not None:
            self._writer.flush()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write what is queued, for `timeout_s` at most, and let other processes write. Idempotent."""
        has_ended = self._writer is None or self._writer.close(timeout_s)
        with self._reading:
            if self._index is not None:
                self._index.close()
                self._index = None
            self._reader.close()
        if self._writer is not None and has_ended:
            self._written_index.close()
            self._lock.release()

    def verify(self) -> tuple[int, int]:
        """Read every page; those that are not sound are deleted. Returns how many were sound, and how many were not."""
        n_sound = n_damaged = 0
        nothing: list[IndexedPage] = []
        for page in self._read(lambda index: index.pages(), nothing):
            if self._image(page, []) is None:
                n_damaged += 1
            else:
                n_sound += 1
        self.flush()
        return n_sound, n_damaged

    def report(self) -> StoreReport:
        """The state of the store."""
        writer = self._writer
        off_because = self._off_because or (writer.off_because if writer is not None else None)
        mode = "off" if off_because is not None else "writing" if writer is not None else "reading"
        n_pages = self._read(lambda index: index.n_pages(), 0)
        live = n_pages * record_bytes(self.identity.image_bytes)
        return StoreReport(
            mode=mode,
            off_because=off_because,
            pages=n_pages,
            live_bytes=live,
            file_bytes=folder_bytes(self.folder),
            quota_bytes=self.quota_bytes,
            read_pages=self.read_pages,
            read_bytes=self.read_bytes,
            read_s=self.read_s,
            written_pages=writer.counts.written if writer else 0,
            dropped_pages=writer.counts.dropped if writer else 0,
            damaged_pages=self.n_damaged + (writer.counts.lost if writer else 0),
            evicted_pages=writer.counts.evicted if writer else 0,
            purged_pages=writer.counts.purged if writer else 0,
        )

    # --- inside ------------------------------------------------------------------------------------------------------

    def _open_for_writing(self, directory: Path) -> None:
        room = max(make_room_beside(directory, self.folder, self.quota_bytes), self.quota_bytes // 2)
        for attempt in (1, 2):
            index = None
            try:
                if prepare_folder(self.folder, self.identity):
                    self._warn("the folder was of another format or damaged, and was emptied")
                self._written_index = index = StoreIndex(self.folder / INDEX_NAME)
                self._index = StoreIndex(self.folder / INDEX_NAME, read_only=True)
                self._writer = StoreWriter(self.folder, index, self.identity.image_bytes, quota_bytes=room)
                return
            except OSError as error:
                raise KVStoreError(
                    f"the KV store in {self.folder} cannot be opened ({error}); give another directory"
                ) from error
            except sqlite3.Error as error:
                for opened in (index, self._index):
                    if opened is not None:
                        opened.close()
                if attempt == 2:
                    raise KVStoreError(
                        f"the KV store in {self.folder} cannot be opened ({error}); delete that folder, or give "
                        "another directory"
                    ) from error
                # Without its index nothing in the store can be found; it is a cache, so it starts anew.
                self._warn(f"its index is damaged ({error}); it starts empty")
                clear_folder(self.folder)

    def _open_for_reading(self) -> None:
        self._warn("another process or engine writes to it; this one reads only, and keeps no new pages")
        try:
            if read_manifest(self.folder) != self.identity.manifest():
                raise sqlite3.DatabaseError("the manifest is not there yet, or of another format")
            self._index = StoreIndex(self.folder / INDEX_NAME, read_only=True)
        except sqlite3.Error as error:
            self._switch_off(error)

    def _image(self, row: IndexedPage, ahead: Seq[tuple[int, int]]) -> memoryview | None:
        """The page's bytes; None, and the row deleted, if they are not what was written."""
        place = row.place
        with self._reading:
            try:
                self._reader.close_removed()
                self._reader.read_ahead(ahead)
                image = self._reader.read(place.segment, place.offset, row.name.key, place.checksum)
            except (OSError, OverflowError, ValueError):
                image = None
        if image is None:
            self._discard(row.name)
        return image

    def _discard(self, name: PageName) -> None:
        """Delete the row of a page that is not what it should be, unless it has been moved or replaced just now."""
        self.n_damaged += 1
        if self._writer is not None:
            writer = self._writer
            writer.later(lambda: writer.delete_damaged(name))

    def _read(self, action: Callable[[StoreIndex], _T], otherwise: _T) -> _T:
        with self._reading:
            if self._index is None:
                return otherwise
            try:
                return action(self._index)
            except sqlite3.Error as error:
                self._switch_off(error)
                return otherwise

    def _later(self, action: Callable[[StoreIndex], object]) -> None:
        if self._writer is not None:
            self._writer.later(lambda: action(self._written_index))

    def _purge(self, find: Callable[[StoreIndex], list[bytes]], what: str) -> int:
        n_pages = None if self._writer is None else self._writer.purge(lambda: find(self._written_index))
        if n_pages is None:
            raise KVStoreError(
                f"{what} could not be erased from {self.folder}: this process cannot write to it "
                f"({self.report().off_because or 'another process does'}); purge there, or delete the folder"
            )
        return n_pages

    def _switch_off(self, error: Exception) -> None:
        self._off_because = f"{type(error).__name__}: {error}"
        self._warn(f"it cannot be read ({error}); requests go on without it")
        if self._index is not None:
            self._index.close()
            self._index = None

    def _warn(self, what: str) -> None:
        _logger.warning("KV store in %s: %s", self.folder, what)

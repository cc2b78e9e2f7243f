"""The one thread that changes a store: appends, rows, eviction, compaction, erasure. Callers never wait for the disk.

Pages come through a queue of bounded bytes; what does not fit is dropped and counted. Whatever has come together while
the last batch was being written is the next batch: one fsync for its bytes, then one transaction for its rows. When
the disk fails or is full, writing stops for good, with one warning, and reading goes on.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from exl2_rag.llm.kv_store.page_store import PageName, PageRecord
from exl2_rag.llm.kv_store.segment_space import MAX_SEGMENT_BYTES, SegmentSpace
from exl2_rag.llm.kv_store.store_index import StoreIndex

ResultT = TypeVar("ResultT")
_logger = logging.getLogger(__name__)

QUEUE_BYTES = 256 * 2**20
BATCH_BYTES = 64 * 2**20
"""Bytes of one group commit; more would keep the rows of what is already on the disk waiting."""


@dataclass(slots=True)
class WriterCounts:
    """What has happened since the store was opened, in pages."""

    written: int = 0
    dropped: int = 0
    evicted: int = 0
    lost: int = 0
    purged: int = 0


class StoreWriter:
    """Owns a folder's segments and writes to its index.

    Args:
        quota_bytes: segments take no more than this.
        queue_bytes: images that may wait to be written.

    Raises:
        OSError, sqlite3.Error: the folder cannot be opened for writing.
    """

    def __init__(
        self,
        folder: Path,
        index: StoreIndex,
        image_bytes: int,
        *,
        quota_bytes: int,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.counts = WriterCounts()
        self.off_because: str | None = None  # written once, by the thread
        self.on_room: Callable[[], None] | None = None  # called by the thread when the queue has room again
        segment_bytes = min(MAX_SEGMENT_BYTES, quota_bytes // 16)
        self.space = SegmentSpace(folder, index, image_bytes, segment_bytes)
        # Compaction copies before it removes, so it needs the room of a segment.
        self._limit_bytes = quota_bytes - max(segment_bytes, self.space.record_bytes)
        self._index = index
        self._queue_bytes = queue_bytes
        self._folder = folder
        self._condition = threading.Condition()
        self._queue: deque[PageRecord | Callable[[], None]] = deque()
        self._queued_bytes = 0
        self._is_closing = False
        self._note_lost()
        index.unpin_all()
        self._trim()
        if index.is_erasure_due():  # a purge was cut short
            self._erase()
        self._thread = threading.Thread(target=self._run, name="exl2-rag kv store", daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """Whether a page would be accepted now."""
        return not self._is_closing and self.off_because is None and self._queued_bytes < self._queue_bytes

    def put(self, records: Seq[PageRecord]) -> int:
        """Queue pages to be written; returns how many found room. The rest are dropped and counted."""
        n_accepted = 0
        with self._condition:
            for record in records:
                if not self.has_room:
                    break
                self._queue.append(record)
                self._queued_bytes += len(record.image)
                n_accepted += 1
            self._condition.notify()
        self.counts.dropped += len(records) - n_accepted
        return n_accepted

    def later(self, action: Callable[[], object]) -> None:
        """Have `action` run by the thread after everything queued so far; forgotten when writing has stopped."""
        with self._condition:
            if not self._is_closing:
                self._queue.append(lambda: self._guard(action))
                self._condition.notify()

    def call(self, action: Callable[[], ResultT], otherwise: ResultT) -> ResultT:
        """As `later`, but wait for its result; `otherwise` if it could not be done."""
        future: Future[ResultT] = Future()

        def run() -> None:
            future.set_result(otherwise if self.off_because is not None else action())

        def guarded() -> None:
            self._guard(run)
            if not future.done():
                future.set_result(otherwise)

        with self._condition:
            if self._is_closing:
                return otherwise
            self._queue.append(guarded)
            self._condition.notify()
        return future.result()

    def flush(self) -> None:
        """Wait until everything queued so far is on the disk, or writing has stopped."""
        self.call(lambda: None, None)

    def evict(self, keys: Seq[bytes]) -> int:
        """Drop pages and what follows them; returns how many are gone."""
        return self.call(lambda: self._delete(self._index.with_descendants(keys)), 0)

    def delete_damaged(self, name: PageName) -> None:
        """Delete a page that could not be read, and what follows it, unless it can be read now (it was just moved)."""
        page = self._index.find([name.key]).get(name.key)
        if page is None or page.name != name or not self.space.is_sound(page):
            self._delete(self._index.with_descendants([name.key]))
            self._trim()

    def purge(self, find: Callable[[], list[bytes]]) -> int | None:
        """Erase the pages that `find` names, and what follows them, on the disk when this returns.

        Returns:
            How many pages are gone; None if it could not be done.
        """

        def run() -> int:
            n_pages = self._delete(self._index.with_descendants(find()), erase=True)
            # Also where nothing was found: pages that were evicted lie in the segments until they are compacted.
            self._erase()
            self.counts.purged += n_pages
            return n_pages

        return self.call(run, None)

    def close(self, timeout_s: float) -> bool:
        """Write what is queued and end the thread; what takes longer than `timeout_s` is dropped. Idempotent.

        Returns:
            Whether the thread has ended.
        """
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.off_because = "the store was closed before everything was written"
            self._thread.join(1.0)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._is_closing:
                    self._condition.wait()
                if not self._queue:
                    break
                work = list(self._queue)
                self._queue.clear()
            self._work(work)
        self._guard(self.space.close)

    def _work(self, work: list[PageRecord | Callable[[], None]]) -> None:
        for is_page, group in groupby(work, key=lambda one: isinstance(one, PageRecord)):
            if not is_page:
                for action in group:
                    assert not isinstance(action, PageRecord)
                    action()
                continue
            batch: list[PageRecord] = []
            for record in group:
                assert isinstance(record, PageRecord)
                batch.append(record)
                if sum(len(one.image) for one in batch) >= BATCH_BYTES:
                    self._write_batch(batch)
                    batch = []
            self._write_batch(batch)

    def _write_batch(self, batch: list[PageRecord]) -> None:
        if not batch:
            return
        n_written = self.counts.written
        self._guard(lambda: self._write(batch))
        if self.off_because is not None and self.counts.written == n_written:
            self.counts.dropped += len(batch)
        with self._condition:
            was_full = self._queued_bytes >= self._queue_bytes
            self._queued_bytes -= sum(len(one.image) for one in batch)
        if was_full and self.on_room is not None:
            self.on_room()

    def _write(self, batch: list[PageRecord]) -> None:
        """Payload, fsync, rows: in this order."""
        there = self._index.contains([key for one in batch for key in (one.name.key, one.name.parent_key)])
        wanted: list[PageRecord] = []
        for record in batch:
            if record.name.key in there:
                continue
            if record.name.parent_key != record.root_key and record.name.parent_key not in there:
                self.counts.dropped += 1  # its parent was dropped or evicted; it could never be found
                continue
            there.add(record.name.key)
            wanted.append(record)
        if not wanted:
            return
        if not self._make_room(len(wanted) * self.space.record_bytes, {one.name.parent_key for one in wanted}):
            self.counts.dropped += len(wanted)
            return
        placed = self.space.append(wanted)
        self._index.insert(placed)
        for _, place in placed:
            self.space.count(place.segment, 1)
        self.counts.written += len(placed)
        self._trim()

    def _make_room(self, n_bytes: int, protected: set[bytes]) -> bool:
        """Evict and compact until so many bytes fit; False if they cannot."""
        while self.space.file_bytes + n_bytes > self._limit_bytes:
            if self.space.compact_one():
                self._note_lost()
                continue
            wanted = max(1, n_bytes // self.space.record_bytes, self._limit_bytes // self.space.record_bytes // 32)
            victims = self._index.victims(wanted, protected)
            if victims:
                self.counts.evicted += self._delete([key for key, _ in victims], clock=victims[-1][1])
            elif not self.space.compact_one(least_dead_share=0.0):
                return False
        return True

    def _delete(self, keys: Seq[bytes], *, erase: bool = False, clock: float | None = None) -> int:
        gone = self._index.delete(keys, erase=erase, clock=clock)
        for segment, _, _ in gone:
            self.space.count(segment, -1)
        return len(gone)

    def _erase(self) -> None:
        self.space.erase_dead()
        self._index.note_erased()

    def _trim(self) -> None:
        """Compact whatever is mostly dead."""
        while self.space.compact_one():
            self._note_lost()

    def _note_lost(self) -> None:
        self.counts.lost += self.space.n_lost
        self.space.n_lost = 0

    def _guard(self, action: Callable[[], object]) -> None:
        """Run it; stop writing for good if the disk or the index fail."""
        if self.off_because is not None:
            return
        try:
            action()
        except Exception as error:  # whatever it is, requests must not notice
            self.off_because = f"{type(error).__name__}: {error}"
            _logger.warning(
                "the KV store in %s cannot be written to any more (%s); requests go on, new pages are not kept",
                self._folder,
                self.off_because,
            )

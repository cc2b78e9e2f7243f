"""The segments of a store as its writer sees them: appends, erasures, compaction, and how much is dead."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

from exl2_rag.llm.kv_store.page_store import PageRecord
from exl2_rag.llm.kv_store.segment import (
    ALIGNMENT,
    SegmentReader,
    SegmentWriter,
    erase,
    record_bytes,
    sync_directory,
)
from exl2_rag.llm.kv_store.store_directory import segments
from exl2_rag.llm.kv_store.store_index import IndexedPage, Place, StoreIndex

MAX_SEGMENT_BYTES = 256 * 2**20
DEAD_SHARE = 0.5
"""A segment is compacted when more than this share of it is dead."""


class SegmentSpace:
    """Appends to the newest segment and keeps count of live and dead bytes. For the writer's thread alone.

    Opening removes what no row points at, and rows that point at nothing.

    Raises:
        OSError, sqlite3.Error: from every method, when the disk or the index fail.
    """

    def __init__(self, folder: Path, index: StoreIndex, image_bytes: int, segment_bytes: int) -> None:
        self.record_bytes = record_bytes(image_bytes)
        self.n_lost = 0  # rows removed because their bytes are not there or not sound
        self._folder = folder
        self._index = index
        self._image_bytes = image_bytes
        self._segment_bytes = max(segment_bytes, self.record_bytes)
        self._sizes = {number: path.stat().st_size for number, path in segments(folder).items()}
        self._live = dict.fromkeys(self._sizes, 0)
        self._active: SegmentWriter | None = None
        self._is_new = False  # the active segment's name is not durable yet
        self._repair()

    @property
    def file_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(self._sizes.values())

    @property
    def live_bytes(self) -> int:
        """Bytes of all records that rows point at."""
        return sum(self._live.values())

    def append(self, records: Seq[PageRecord]) -> list[tuple[PageRecord, Place]]:
        """Write records and wait until they are on the disk. The caller then adds their rows, and calls `count`."""
        placed = []
        for record in records:
            segment, offset, checksum = self._append(record.name.key, len(record.name.token_ids), record.image)
            placed.append((record, Place(segment, offset, len(record.image), checksum)))
        self._sync()
        return placed

    def count(self, segment: int, n_records: int) -> None:
        """Rows of so many records of a segment were added, or (negative) removed."""
        if segment in self._live:
            self._live[segment] += n_records * self.record_bytes

    def compact_one(self, least_dead_share: float = DEAD_SHARE) -> bool:
        """Copy what lives in the deadest segment to the newest and remove it; False if none is dead enough."""
        numbers = [number for number in self._sizes if self._dead_share(number) > least_dead_share]
        if not numbers:
            return False
        number = max(numbers, key=self._dead_share)
        if self._active is not None and self._active.number == number:
            self._close_active()
        moved = self._copy_live(number)
        self._sync()
        self._index.move(moved)
        for _, segment, _ in moved:
            self.count(segment, 1)
        self._remove(number)
        return True

    def is_sound(self, page: IndexedPage) -> bool:
        """Whether the record of a row holds what was written."""
        reader = SegmentReader(self._folder, self._image_bytes)
        try:
            return reader.read(page.place.segment, page.place.offset, page.name.key, page.place.checksum) is not None
        except (OSError, OverflowError, ValueError):
            return False
        finally:
            reader.close()

    def erase_dead(self) -> None:
        """Overwrite everything that no row points at with zeros."""
        places: dict[int, list[int]] = {number: [] for number in self._sizes}
        for page in self._index.pages():
            if page.place.segment in places:
                places[page.place.segment].append(page.place.offset)
        for number, offsets in places.items():
            end = 0
            for offset in [*offsets, self._sizes[number]]:
                if offset > end:
                    erase(self._folder, number, end, offset - end)
                end = offset + self.record_bytes

    def close(self) -> None:
        """Close the newest segment."""
        self._close_active()

    def _repair(self) -> None:
        ends = dict.fromkeys(self._sizes, 0)
        pages = self._index.pages()
        lost = set(self._index.keys()) - {page.name.key for page in pages if self._is_there(page.place)}
        lost.update(self._index.orphans())
        if lost:
            self.n_lost += len(self._index.delete(self._index.with_descendants(list(lost))))
        for place in (page.place for page in self._index.pages()):
            ends[place.segment] = max(ends[place.segment], place.offset + self.record_bytes)
            self._live[place.segment] += self.record_bytes
        for number, end in ends.items():
            if end == 0:
                self._remove(number)
        newest = max(self._sizes, default=None)
        if newest is not None and ends[newest] + self.record_bytes <= self._segment_bytes:
            self._active = SegmentWriter(self._folder, newest, ends[newest])
            self._sizes[newest] = ends[newest]

    def _is_there(self, place: Place) -> bool:
        """Whether a record of the right size can lie there."""
        room = self._sizes.get(place.segment, 0) - self.record_bytes
        return place.image_bytes == self._image_bytes and 0 <= place.offset <= room and place.offset % ALIGNMENT == 0

    def _append(self, key: bytes, n_tokens: int, image: bytes | bytearray | memoryview) -> tuple[int, int, bytes]:
        if self._active is not None and self._active.end + self.record_bytes > self._segment_bytes:
            self._close_active()
        if self._active is None:
            number = self._index.take_segment_number()
            self._active = SegmentWriter(self._folder, number)
            self._sizes[number] = self._live[number] = 0
            self._is_new = True
        offset, checksum = self._active.append(key, n_tokens, image)
        self._sizes[self._active.number] = self._active.end
        return self._active.number, offset, checksum

    def _copy_live(self, number: int) -> list[tuple[bytes, int, int]]:
        """Append what lives in a segment to others; returns the new places as (key, segment, offset)."""
        moved = []
        reader = SegmentReader(self._folder, self._image_bytes)
        try:
            for page in self._index.pages(number):
                image = reader.read(number, page.place.offset, page.name.key, page.place.checksum)
                if image is None:
                    gone = self._index.delete(self._index.with_descendants([page.name.key]))
                    self.n_lost += len(gone)
                    for segment, _, _ in gone:
                        self.count(segment, -1)
                else:
                    segment, offset, _ = self._append(page.name.key, len(page.name.token_ids), image)
                    moved.append((page.name.key, segment, offset))
        finally:
            reader.close()
        still_there = self._index.contains([key for key, _, _ in moved])
        return [one for one in moved if one[0] in still_there]

    def _sync(self) -> None:
        if self._active is not None:
            self._active.sync()
        if self._is_new:
            sync_directory(self._folder)
            self._is_new = False

    def _close_active(self) -> None:
        if self._active is not None:
            self._active.sync()
            self._active.close()
            self._active = None

    def _remove(self, number: int) -> None:
        segments(self._folder)[number].unlink(missing_ok=True)
        del self._sizes[number], self._live[number]

    def _dead_share(self, number: int) -> float:
        size = self._sizes[number]
        return (size - self._live[number]) / size if size else 0.0

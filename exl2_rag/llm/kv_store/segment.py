"""Segment files: page images one after the other, each behind a header that says what it is.

    record at a multiple of 4096:
        64 bytes   header (little endian)
             0   8   magic "EXL2KVPG"
             8   4   format version
            12   4   tokens on the page
            16  16   page key
            32   8   bytes of the image
            40  16   XXH3-128 of the image
            56   8   XXH3-64 of the 56 bytes before
        zeros up to 4096
        the image
        zeros up to the next multiple of 4096

Records are only ever appended. What no row of the index points at is garbage; erasing overwrites it with zeros.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import xxhash

FORMAT_VERSION = 1
MAGIC = b"EXL2KVPG"
ALIGNMENT = 4096
HEADER = struct.Struct("<8sII16sQ16s")
HEADER_BYTES = HEADER.size + 8
_ZEROS = bytes(ALIGNMENT)


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What the header of a record says."""

    key: bytes
    n_tokens: int
    image_bytes: int
    checksum: bytes

    def encode(self) -> bytes:
        """The first 4096 bytes of the record."""
        fields = HEADER.pack(MAGIC, FORMAT_VERSION, self.n_tokens, self.key, self.image_bytes, self.checksum)
        return (fields + xxhash.xxh3_64_digest(fields)).ljust(ALIGNMENT, b"\0")

    @classmethod
    def decode(cls, block: bytes | bytearray | memoryview) -> RecordHeader | None:
        """The header at the start of `block`; None if there is no sound one of this format's version."""
        fields = bytes(block[: HEADER.size])
        if len(fields) < HEADER.size or bytes(block[HEADER.size : HEADER_BYTES]) != xxhash.xxh3_64_digest(fields):
            return None
        magic, version, n_tokens, key, image_bytes, checksum = HEADER.unpack(fields)
        if magic != MAGIC or version != FORMAT_VERSION:
            return None
        return cls(key, n_tokens, image_bytes, checksum)


def record_bytes(image_bytes: int) -> int:
    """Bytes a record takes in its segment."""
    return ALIGNMENT + -(-image_bytes // ALIGNMENT) * ALIGNMENT


def image_checksum(image: bytes | bytearray | memoryview) -> bytes:
    """The checksum that is kept of an image, 16 bytes."""
    return xxhash.xxh3_128_digest(image)


def segment_path(directory: Path, number: int) -> Path:
    """Where a segment lies."""
    return directory / f"seg-{number:06d}.kvs"


def segment_number(path: Path) -> int | None:
    """The number in a segment's file name; None for other files."""
    number = path.name.removeprefix("seg-").removesuffix(".kvs")
    return int(number) if path.name == f"seg-{number}.kvs" and number.isdecimal() else None


class SegmentReader:
    """Reads records of the segments of one directory, and keeps the files open. For one thread at a time.

    Args:
        image_bytes: bytes of an image; all of a store are the same.
    """

    def __init__(self, directory: Path, image_bytes: int) -> None:
        self._directory = directory
        self._files: dict[int, int] = {}
        self._header = bytearray(ALIGNMENT)
        self._image = memoryview(bytearray(image_bytes))

    def read(self, segment: int, offset: int, key: bytes, checksum: bytes) -> memoryview | None:
        """The image of a record, valid until the next call; None unless every byte is what was written for `key`.

        Raises:
            OSError: the file cannot be read.
        """
        if offset < 0 or offset % ALIGNMENT:
            return None
        size = ALIGNMENT + len(self._image)
        if os.preadv(self._file(segment), [self._header, self._image], offset) != size:
            return None
        header = RecordHeader.decode(self._header)
        if header is None or header.key != key or header.image_bytes != len(self._image) or header.checksum != checksum:
            return None
        return self._image if image_checksum(self._image) == checksum else None

    def read_ahead(self, places: Seq[tuple[int, int]]) -> None:
        """Let the system fetch the records at these (segment, offset) while others are being worked on."""
        if not hasattr(os, "posix_fadvise"):
            return
        for segment, offset in places:
            os.posix_fadvise(self._file(segment), offset, record_bytes(len(self._image)), os.POSIX_FADV_WILLNEED)

    def close_removed(self) -> None:
        """Close the files of segments that are gone, whose room on the disk is only free then."""
        for segment, file in list(self._files.items()):
            if os.fstat(file).st_nlink == 0:
                os.close(self._files.pop(segment))

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, segment: int) -> int:
        file = self._files.get(segment)
        if file is None:
            file = os.open(segment_path(self._directory, segment), os.O_RDONLY | os.O_CLOEXEC)
            self._files[segment] = file
        return file


class SegmentWriter:
    """Appends records to one segment.

    Args:
        end: bytes of the file that count; what lies behind is cut off.

    Raises:
        OSError: the file cannot be made or opened.
    """

    def __init__(self, directory: Path, number: int, end: int = 0) -> None:
        self.number = number
        self.end = end
        self._file = os.open(segment_path(directory, number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, end)

    def append(self, key: bytes, n_tokens: int, image: bytes | bytearray | memoryview) -> tuple[int, bytes]:
        """Write a record at the end; returns its offset and checksum. Durable only after `sync`.

        Raises:
            OSError: there is no room, or the disk fails; nothing of the record counts then.
        """
        checksum = image_checksum(image)
        header = RecordHeader(key, n_tokens, len(image), checksum).encode()
        padding = _ZEROS[: record_bytes(len(image)) - ALIGNMENT - len(image)]
        offset = self.end
        try:
            _write_all(self._file, [header, image, padding], offset)
        except OSError:
            os.ftruncate(self._file, offset)
            raise
        self.end = offset + record_bytes(len(image))
        return offset, checksum

    def sync(self) -> None:
        """Wait until everything appended is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def erase(directory: Path, segment: int, offset: int, n_bytes: int) -> None:
    """Overwrite a part of a segment with zeros, on the disk when this returns. Harmless when the file is gone."""
    try:
        file = os.open(segment_path(directory, segment), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        end = min(offset + n_bytes, os.fstat(file).st_size)
        for start in range(offset, end, 2**20):
            _write_all(file, [bytes(min(2**20, end - start))], start)
        os.fsync(file)
    finally:
        os.close(file)


def sync_directory(directory: Path) -> None:
    """Make new and removed names of a directory durable."""
    file = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _write_all(file: int, parts: Seq[bytes | bytearray | memoryview], offset: int) -> None:
    left = [memoryview(part).cast("B") for part in parts if len(part)]
    while left:
        written = os.pwritev(file, left, offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left and written:
            left[0] = left[0][written:]

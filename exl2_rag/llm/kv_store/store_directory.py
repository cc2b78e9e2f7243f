"""The directory of a store: one folder an identity, each with its manifest, and one writer at a time.

    DIR/                              mode 0700
        <32 hex digits>/              the first 16 bytes of the identity's fingerprint
            manifest.json             format version, page size, image bytes, and every field of the identity in clear
            index.sqlite              see `store_index`
            seg-000001.kvs            see `segment`
            lock                      held by the process that writes

Pages of another model, cache dtype, page size or format lie in another folder, so they are never looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from exl2_rag.errors import KVStoreError
from exl2_rag.llm.kv_store.segment import FORMAT_VERSION, segment_number
from exl2_rag.llm.kv_store.store_index import StoreIndex

INDEX_NAME = "index.sqlite"
MANIFEST_NAME = "manifest.json"
LOCK_NAME = "lock"
_NAME_DIGITS = 32


@dataclass(frozen=True, slots=True)
class StoreIdentity:
    """What the pages of a store have in common.

    Attributes:
        fingerprint: names model, cache and format; roots every page key.
        page_size: tokens on a page.
        image_bytes: bytes of a page's image.
        fields: what the fingerprint was made of, in clear, for people to read.
    """

    fingerprint: bytes
    page_size: int
    image_bytes: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder_name(self) -> str:
        """Its folder in a store's directory."""
        return self.fingerprint.hex()[:_NAME_DIGITS].ljust(_NAME_DIGITS, "0")

    def manifest(self) -> dict[str, Any]:
        """The contents of its manifest."""
        return {
            "format": FORMAT_VERSION,
            "fingerprint": self.fingerprint.hex(),
            "page_size": self.page_size,
            "image_bytes": self.image_bytes,
            "identity": dict(self.fields),
        }


class WriterLock:
    """Held by the one process that writes to a folder; the system lets go of it when the process ends, however."""

    def __init__(self, folder: Path) -> None:
        self._lock = FileLock(folder / LOCK_NAME, thread_local=False, mode=0o600)

    def acquire(self) -> bool:
        """Take it; False if another process (or another engine of this one) has it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Let others write."""
        self._lock.release()


def make_directory(path: Path) -> None:
    """Make a directory that only its owner can enter, or check that one that is there can be written to.

    Raises:
        KVStoreError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = path / f".probe-{os.getpid()}"
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as error:
        raise KVStoreError(
            f"kv_store={str(path)!r} cannot be used as a directory to write to ({error.strerror or error}); give one "
            "that this user can write to, or leave kv_store at None"
        ) from error


def make_folder(directory: Path, identity: StoreIdentity) -> Path:
    """The folder of an identity; whatever the mode of the directory above it, only its owner can enter it.

    Raises:
        KVStoreError: it cannot be made or written to.
    """
    make_directory(directory)
    folder = directory / identity.folder_name
    make_directory(folder)
    folder.chmod(0o700)  # text can be recovered from keys and values
    return folder


def prepare_folder(folder: Path, identity: StoreIdentity) -> bool:
    """Make the folder of an identity ready for its writer, who holds the lock.

    Returns:
        Whether something had to be thrown away: a manifest that is damaged, of another format or another identity.

    Raises:
        OSError: it cannot be written to.
    """
    path = folder / MANIFEST_NAME
    if read_manifest(folder) == json.loads(json.dumps(identity.manifest())):
        return False
    had_content = clear_folder(folder)
    fresh = path.with_name(f"{MANIFEST_NAME}.new")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(identity.manifest(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    return had_content


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder's manifest says; None if there is no readable one."""
    try:
        values = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def clear_folder(folder: Path) -> bool:
    """Delete the index and all segments; returns whether there were any. The caller holds the lock."""
    found = False
    for path in [*folder.glob(f"{INDEX_NAME}*"), folder / MANIFEST_NAME, *segments(folder).values()]:
        if path.exists():
            found = True
            path.unlink()
    return found


def segments(folder: Path) -> dict[int, Path]:
    """The segment files of a folder by number."""
    numbered = ((segment_number(path), path) for path in folder.glob("seg-*.kvs"))
    return {number: path for number, path in numbered if number is not None}


def folder_bytes(folder: Path) -> int:
    """Bytes of a folder's files on the disk."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # another process removed it just now
    return total


def identity_folders(directory: Path) -> Iterator[Path]:
    """The folders of all identities in a store's directory."""
    for path in sorted(directory.glob("*")):
        is_named = len(path.name) == _NAME_DIGITS and all(digit in "0123456789abcdef" for digit in path.name)
        if is_named and path.is_dir():
            yield path


def make_room_beside(directory: Path, own: Path, quota_bytes: int) -> int:
    """Delete folders of other identities, least recently used first, until they leave half of the quota.

    Folders that another process writes to stay.

    Returns:
        What is left of the quota for the folder `own`.
    """
    others = [path for path in identity_folders(directory) if path != own]
    sizes = {path: folder_bytes(path) for path in others}
    for path in sorted(others, key=_last_use):
        if sum(sizes.values()) <= quota_bytes // 2:
            break
        if remove_folder(path):
            del sizes[path]
    return max(0, quota_bytes - sum(sizes.values()))


def remove_folder(folder: Path) -> bool:
    """Delete the folder of an identity; False if another process writes to it."""
    lock = WriterLock(folder)
    if not lock.acquire():
        return False
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
    return True


def _last_use(folder: Path) -> float:
    times = [path.stat().st_mtime for path in folder.glob(f"{INDEX_NAME}*") if path.exists()]
    return max(times, default=0.0)


@dataclass(frozen=True, slots=True)
class StoredIdentity:
    """The folder of one identity, as `exl2-rag cache` shows it.

    Attributes:
        manifest: what it says; None if it cannot be read.
        n_pages: rows of the index; None if that cannot be read.
        file_bytes: on the disk.
        sources: pages by source.
        is_open: a process writes to it now.
    """

    folder: Path
    manifest: dict[str, Any] | None
    n_pages: int | None
    file_bytes: int
    sources: dict[str, int]
    is_open: bool


def require_directory(directory: Path) -> None:
    """Refuse what is no directory.

    Raises:
        KVStoreError: it is none.
    """
    if not directory.is_dir():
        raise KVStoreError(f"there is no directory {directory}; give the one that was given as kv_store")


def stored_identities(directory: Path) -> list[StoredIdentity]:
    """What lies in a store's directory. Changes nothing.

    Raises:
        KVStoreError: there is no such directory.
    """
    require_directory(directory)
    found = []
    for folder in identity_folders(directory):
        n_pages, sources = None, {}
        try:
            index = StoreIndex(folder / INDEX_NAME, read_only=True)
        except sqlite3.Error:
            index = None
        if index is not None:
            try:
                n_pages, sources = index.n_pages(), index.sources()
            except sqlite3.Error:
                pass
            finally:
                index.close()
        lock = WriterLock(folder)
        is_free = lock.acquire()
        if is_free:
            lock.release()
        found.append(
            StoredIdentity(folder, read_manifest(folder), n_pages, folder_bytes(folder), sources, is_open=not is_free)
        )
    return found

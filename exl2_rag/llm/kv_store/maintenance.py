"""What can be done with a store's directory without a model: purge, verify, clear."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from exl2_rag.errors import KVStoreError
from exl2_rag.llm.kv_store.disk_store import DiskStore
from exl2_rag.llm.kv_store.store_directory import (
    StoreIdentity,
    identity_folders,
    read_manifest,
    remove_folder,
    require_directory,
    stored_identities,
)


@dataclass(frozen=True, slots=True)
class Verified:
    """What reading every page of an identity's folder found; pages that were not sound have been deleted."""

    folder: Path
    sound_pages: int
    damaged_pages: int


def purge_sources(directory: Path, sources: Iterable[str]) -> int:
    """Erase every page made from these sources, of all identities; returns how many pages are gone.

    A folder whose manifest cannot be read is deleted as a whole, since nobody could say what lies in it.

    Raises:
        KVStoreError: there is no such directory, a process writes to it now, or the disk fails.
    """
    names = list(sources)
    n_pages = 0
    for folder in _folders(directory):
        store = open_folder(folder)
        if store is None:
            _remove(folder)
            continue
        try:
            n_pages += store.purge_all(names)
        finally:
            store.close()
    return n_pages


def stored_sources(directory: Path) -> set[str]:
    """Ids of all documents that pages in a store were made from, as far as its folders can be read."""
    return {source for found in stored_identities(directory) for source in found.sources}


def verify(directory: Path) -> list[Verified]:
    """Read and check every page of all identities, and delete what is damaged.

    Raises:
        KVStoreError: there is no such directory, or a process writes to it now.
    """
    found = []
    for folder in _folders(directory):
        store = open_folder(folder)
        if store is None:
            continue
        try:
            found.append(Verified(folder, *store.verify()))
        finally:
            store.close()
    return found


def clear(directory: Path) -> int:
    """Delete the folders of all identities; returns how many.

    Raises:
        KVStoreError: there is no such directory, or a process writes to it now.
    """
    folders = _folders(directory)
    for folder in folders:
        _remove(folder)
    return len(folders)


def open_folder(folder: Path) -> DiskStore | None:
    """The store in an identity's folder, as it is, open for writing; None if its manifest cannot be read.

    Raises:
        KVStoreError: another process writes to it.
    """
    manifest = read_manifest(folder)
    try:
        assert manifest is not None
        identity = StoreIdentity(
            bytes.fromhex(manifest["fingerprint"]), manifest["page_size"], manifest["image_bytes"], manifest["identity"]
        )
        is_this = identity.folder_name == folder.name and identity.manifest() == manifest
    except (AssertionError, KeyError, TypeError, ValueError):
        return None
    if not is_this:
        return None
    store = DiskStore(folder.parent, identity, sys.maxsize)  # its quota is the business of those who fill it
    if not store.is_writing:
        store.close()
        raise KVStoreError(f"a process writes to {folder} now; end it first, or do this through it (ExL2LLM.purge)")
    return store


def _folders(directory: Path) -> list[Path]:
    require_directory(directory)
    return list(identity_folders(directory))


def _remove(folder: Path) -> None:
    if not remove_folder(folder):
        raise KVStoreError(f"a process writes to {folder} now; end it first")

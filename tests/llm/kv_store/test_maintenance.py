from __future__ import annotations

from pathlib import Path

import pytest

from exl2_rag.errors import KVStoreError
from exl2_rag.llm.kv_store.disk_store import DiskStore
from exl2_rag.llm.kv_store.maintenance import clear, purge_sources, stored_sources, verify
from exl2_rag.llm.kv_store.segment import record_bytes
from exl2_rag.llm.kv_store.store_directory import StoreIdentity, identity_folders, segments
from tests.llm.kv_store.pages import IMAGE_BYTES, PAGE_SIZE, chain, records, text

QUOTA = 64 * record_bytes(IMAGE_BYTES)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two identities, each with a page chain of "a" and one of "b"."""
    for number in (1, 2):
        store = DiskStore(tmp_path, StoreIdentity(bytes([number]) * 32, PAGE_SIZE, IMAGE_BYTES, {"n": number}), QUOTA)
        store.put_many(records(chain(text(1)), sources=("a",)))
        store.put_many(records(chain(text(2)), sources=("b",)))
        store.close()
    return tmp_path


def test_a_source_is_purged_from_the_folders_of_all_models(directory) -> None:
    assert stored_sources(directory) == {"a", "b"}
    assert purge_sources(directory, ["a", "c"]) == 6
    assert stored_sources(directory) == {"b"}
    assert [one.sound_pages for one in verify(directory)] == [3, 3]


def test_a_folder_nobody_can_read_is_deleted_by_a_purge(directory) -> None:
    first, second = identity_folders(directory)
    (first / "manifest.json").write_text("{")
    assert purge_sources(directory, ["a"]) == 3
    assert list(identity_folders(directory)) == [second]


def test_verify_counts_and_deletes_damaged_pages(directory) -> None:
    folder = next(identity_folders(directory))
    path = next(iter(segments(folder).values()))
    content = bytearray(path.read_bytes())
    content[4096 + 77] ^= 1
    path.write_bytes(content)
    found = verify(directory)
    assert [(one.folder == folder, one.sound_pages, one.damaged_pages) for one in found] == [
        (True, 5, 1),
        (False, 6, 0),
    ]
    assert [one.damaged_pages for one in verify(directory)] == [0, 0]
    assert [one.sound_pages for one in verify(directory)] == [3, 6]  # what followed the damaged page went with it


def test_clearing_leaves_nothing(directory) -> None:
    assert clear(directory) == 2
    assert list(directory.iterdir()) == []


def test_a_store_in_use_is_left_alone(directory) -> None:
    store = DiskStore(directory, StoreIdentity(b"\1" * 32, PAGE_SIZE, IMAGE_BYTES, {"n": 1}), QUOTA)
    for action in (verify, clear, lambda path: purge_sources(path, ["a"])):
        with pytest.raises(KVStoreError, match="a process writes to"):
            action(directory)
    store.close()


def test_a_directory_that_is_not_there_is_said(tmp_path) -> None:
    with pytest.raises(KVStoreError, match="there is no directory"):
        clear(tmp_path / "nowhere")

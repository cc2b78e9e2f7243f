from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from exl2_rag.errors import KVStoreError, SettingsError
from exl2_rag.llm.kv_store.disk_store import DiskStore
from exl2_rag.llm.kv_store.page_store import PageName
from exl2_rag.llm.kv_store.segment import record_bytes
from exl2_rag.llm.kv_store.store_directory import StoreIdentity, segments, stored_identities
from tests.llm.kv_store.pages import IDENTITY, IMAGE_BYTES, PAGE_SIZE, TABLE, chain, image_of, records, text

QUOTA = 64 * record_bytes(IMAGE_BYTES)


@pytest.fixture
def store(tmp_path: Path):
    one = DiskStore(tmp_path, IDENTITY, QUOTA)
    yield one
    one.close()


def reopened(store: DiskStore) -> DiskStore:
    store.close()
    return DiskStore(store.folder.parent, store.identity, store.quota_bytes)


def read(store: DiskStore, names: list[PageName]) -> list[bytes]:
    return [bytes(image) for image in store.get_many(names)]


def put(store: DiskStore, seed: int, n_pages: int = 3, **options) -> list[PageName]:
    names = chain(text(seed, n_pages))
    store.put_many(records(names, **options))
    store.flush()
    return names


def images(names: list[PageName]) -> list[bytes]:
    return [bytes(image_of(one.key)) for one in names]


# --- what is kept comes back ----------------------------------------------------------------------------------------


def test_pages_come_back_after_the_store_is_opened_again(store) -> None:
    first, second = put(store, 1), put(store, 2)
    store = reopened(store)
    assert read(store, first) == images(first)
    assert read(store, second) == images(second)
    assert store.contains([one.key for one in first]) == {one.key for one in first}
    report = store.report()
    assert (report.mode, report.pages, report.read_pages, report.damaged_pages) == ("writing", 6, 6, 0)
    store.close()


def test_reading_stops_at_the_first_page_that_is_not_there(store) -> None:
    names = put(store, 1)
    longer = chain([*text(1), 1, 2, 3, 4])
    assert longer[:3] == names
    assert read(store, longer) == images(names)
    assert read(store, chain(text(3))) == []
    assert store.report().damaged_pages == 0


def test_a_page_is_written_once_however_often_it_is_put(store) -> None:
    for _ in range(3):
        put(store, 1)
    assert store.report().written_pages == 3


def test_a_page_without_its_parent_is_refused(store) -> None:
    store.put_many(records(chain(text(1))[1:]))
    store.flush()
    assert store.report().pages == 0
    assert store.report().dropped_pages == 2


def test_the_folder_is_for_its_owner_alone_and_says_in_clear_what_it_holds(store) -> None:
    put(store, 1)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(next(iter(segments(store.folder).values())).stat().st_mode) == 0o600
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["identity"] == {"model": "a test"}
    assert manifest["fingerprint"] == IDENTITY.fingerprint.hex()
    assert (manifest["page_size"], manifest["image_bytes"]) == (PAGE_SIZE, IMAGE_BYTES)
    found = stored_identities(store.folder.parent)
    assert [(one.n_pages, one.is_open) for one in found] == [(3, True)]


# --- another identity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        StoreIdentity(b"\x02" * 32, PAGE_SIZE, IMAGE_BYTES),
        StoreIdentity(b"\x03" * 32, PAGE_SIZE, 2 * IMAGE_BYTES),
        StoreIdentity(b"\x04" * 32, 2 * PAGE_SIZE, IMAGE_BYTES),
    ],
)
def test_another_identity_finds_nothing_and_harms_nothing(store, other) -> None:
    names = put(store, 1)
    store.close()
    with_other = DiskStore(store.folder.parent, other, QUOTA * 2)
    assert read(with_other, names) == []
    with_other.close()
    store = reopened(store)
    assert read(store, names) == images(names)
    store.close()


def test_a_folder_whose_manifest_names_another_identity_is_emptied(store, caplog) -> None:
    names = put(store, 1)
    store.close()
    path = store.folder / "manifest.json"
    path.write_text(path.read_text().replace(IDENTITY.fingerprint.hex(), "00" * 32))
    store = reopened(store)
    assert read(store, names) == []
    assert "emptied" in caplog.text
    store.close()


def test_the_oldest_other_identities_give_way_to_the_quota(tmp_path) -> None:
    folders = []
    for number in range(4):
        identity = StoreIdentity(bytes([number + 1]) * 32, PAGE_SIZE, IMAGE_BYTES)
        store = DiskStore(tmp_path, identity, QUOTA)
        put(store, number, 20)
        folders.append(store.folder)
        store.close()
        os.utime(store.folder / "index.sqlite", (1000 + number, 1000 + number))
    left = [folder.exists() for folder in folders]
    assert left[-1]
    assert not left[0]


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("place", [0, 8, 12, 16, 32, 40, 56, 63, 4096, 4096 + IMAGE_BYTES // 2, 4095 + IMAGE_BYTES])
def test_a_flipped_bit_anywhere_in_a_record_is_a_miss_and_the_page_can_be_written_anew(store, place) -> None:
    names = put(store, 1)
    flip(next(iter(segments(store.folder).values())), record_bytes(IMAGE_BYTES) + place, 3)
    assert read(store, names) == images(names[:1])
    store.flush()
    assert store.contains([one.key for one in names]) == {names[0].key}  # what followed it went with it
    assert store.report().damaged_pages == 1
    put(store, 1)
    assert read(store, names) == images(names)


def test_flipped_padding_is_no_damage(store) -> None:
    names = put(store, 1)
    flip(next(iter(segments(store.folder).values())), 2000)
    assert read(store, names) == images(names)


@pytest.mark.parametrize(
    "change",
    [
        "token_ids = x'00000000010000000200000003000000'",
        "token_ids = x'01'",
        "token_ids = 'text'",
        "parent = x'00'",
        "segment = 7",
        "segment = 'one'",
        "offset = offset + 4096",
        "offset = offset + 1",
        "offset = -4096",
        "offset = 9223372036854775807 / 4096 * 4096",
        "checksum = x'00112233445566778899aabbccddeeff'",
        "nbytes = 17",
        "recompute_s = 'dear'",
    ],
)
def test_a_row_that_lies_is_a_miss_while_open_and_after_opening(store, change) -> None:
    names = put(store, 1)
    database = sqlite3.connect(store.folder / "index.sqlite")
    with database:
        database.execute(f"UPDATE pages SET {change} WHERE key = ?", (names[1].key,))
    database.close()
    for _ in range(2):
        found = read(store, names)
        assert found == images(names[: len(found)])
        assert len(found) < 3 or change.startswith("nbytes")
        store.flush()
        store = reopened(store)
    put(store, 1)
    assert read(store, names) == images(names)
    store.close()


def test_bits_flipped_anywhere_in_the_index_never_give_a_wrong_page(store) -> None:
    texts = [put(store, seed) for seed in range(4)]
    store.close()
    path = store.folder / "index.sqlite"
    sound = path.read_bytes()
    segment_files = {one: one.read_bytes() for one in segments(store.folder).values()}
    n_given = 0
    for number, offset in enumerate(range(0, len(sound), 1499)):
        for extra in store.folder.glob("index.sqlite-*"):
            extra.unlink()
        path.write_bytes(sound)
        for segment, content in segment_files.items():
            segment.write_bytes(content)
        flip(path, offset, number % 8)
        damaged = DiskStore(store.folder.parent, IDENTITY, QUOTA)
        for names in texts:
            found = read(damaged, names)
            assert found == images(names[: len(found)])
            n_given += len(found)
        damaged.close()
    assert n_given > 12  # most flips harm little or nothing


@pytest.mark.parametrize("size", [0, 100, 4096, record_bytes(IMAGE_BYTES) + 5, 2 * record_bytes(IMAGE_BYTES)])
def test_a_truncated_segment_gives_what_is_whole(store, size) -> None:
    names = put(store, 1)
    path = next(iter(segments(store.folder).values()))
    os.truncate(path, size)
    whole = size // record_bytes(IMAGE_BYTES)
    assert read(store, names) == images(names[:whole])
    store = reopened(store)
    assert read(store, names) == images(names[:whole])
    assert store.report().pages == whole
    put(store, 1)
    assert read(store, names) == images(names)
    store.close()


@pytest.mark.parametrize("size", [0, 50, 5000])
def test_a_truncated_or_foreign_index_starts_the_store_empty(store, size, caplog) -> None:
    names = put(store, 1)
    store.close()
    path = store.folder / "index.sqlite"
    os.truncate(path, size)
    store = reopened(store)
    assert read(store, names) == []
    put(store, 1)
    assert read(store, names) == images(names)
    store.close()


def test_a_missing_segment_is_a_miss(store) -> None:
    names = put(store, 1)
    store.close()
    next(iter(segments(store.folder).values())).unlink()
    store = reopened(store)
    assert read(store, names) == []
    assert store.report().damaged_pages == 3
    store.close()


def test_verify_reads_everything_and_deletes_what_is_damaged(store) -> None:
    names = put(store, 1)
    flip(next(iter(segments(store.folder).values())), 2 * record_bytes(IMAGE_BYTES) + 5000)
    assert store.verify() == (2, 1)
    assert store.contains([one.key for one in names]) == {one.key for one in names[:2]}


# --- quota, eviction, compaction -------------------------------------------------------------------------------------


def assert_chains_are_whole(store: DiskStore) -> None:
    rows = store.find(store.contains_all())
    for row in rows.values():
        assert row.name.parent_key in rows or row.name.parent_key == TABLE.root_key


def test_the_files_never_take_more_than_the_quota_and_parents_outlive_their_children(store) -> None:
    for seed in range(60):
        names = put(store, seed, 1 + seed % 5)
        assert sum(path.stat().st_size for path in segments(store.folder).values()) <= QUOTA
        assert read(store, names) == images(names)
        rows = store.find([one.name.key for one in store._written_index.pages()])
        assert all(row.name.parent_key in rows or row.name.parent_key == TABLE.root_key for row in rows.values())
    report = store.report()
    assert report.evicted_pages > 60
    assert report.pages > 30
    assert report.dropped_pages == report.damaged_pages == 0


def test_what_is_worth_more_outlives_what_is_worth_less(store) -> None:
    dear = put(store, 1, recompute_s=100.0)
    used = put(store, 2, recompute_s=1.0)
    for _ in range(50):
        store.touch([one.key for one in used])
    plain = put(store, 3, recompute_s=1.0)
    for seed in range(10, 50):
        put(store, seed, recompute_s=1.0)
    assert read(store, dear) == images(dear)
    assert read(store, used) == images(used)
    assert read(store, plain) == []


def test_a_pinned_page_stays_until_the_process_ends(store) -> None:
    names = put(store, 1, recompute_s=0.0)
    store.set_pinned([one.key for one in names], pinned=True)
    for seed in range(10, 50):
        put(store, seed)
    assert read(store, names) == images(names)
    store = reopened(store)
    for seed in range(60, 100):
        put(store, seed)
    assert read(store, names) == []
    store.close()


def test_eviction_and_compaction_keep_every_other_page_readable(store) -> None:
    texts = [put(store, seed) for seed in range(12)]
    for names in texts[::2]:
        assert store.evict([names[1].key]) == 2
    for names in texts[1::3]:
        store.evict([names[0].key])
    gone = set(range(1, 12, 3))
    for number, names in enumerate(texts):
        expected = [] if number in gone else names[:1] if number % 2 == 0 else names
        assert read(store, names) == images(expected)
    live = store.report().live_bytes
    assert sum(path.stat().st_size for path in segments(store.folder).values()) <= 2 * live + 4 * record_bytes(
        IMAGE_BYTES
    )


def test_a_quota_too_small_for_the_model_is_refused(tmp_path) -> None:
    with pytest.raises(SettingsError, match="kv_store_bytes must be at least"):
        DiskStore(tmp_path, IDENTITY, 15 * record_bytes(IMAGE_BYTES))


# --- purge -----------------------------------------------------------------------------------------------------------


def all_bytes(store: DiskStore) -> bytes:
    return b"".join(path.read_bytes() for path in store.folder.iterdir() if path.name != "lock")


def test_purging_a_source_leaves_none_of_its_bytes_on_the_disk(store) -> None:
    secret = put(store, 1, sources=("secret.pdf",))
    follows = chain(text(1) + [7] * 8)
    store.put_many(records(follows, sources=()))
    other = put(store, 2, sources=("public.pdf",))
    evicted = put(store, 3, sources=("secret.pdf",))
    store.evict([evicted[0].key])
    assert images(secret)[1] in all_bytes(store)
    assert store.purge("secret.pdf") == 5
    left = all_bytes(store)
    for image in [*images(follows), *images(evicted)]:
        assert image[:64] not in left
        assert image[-64:] not in left
    assert b"secret.pdf" not in left
    assert all(one.key not in left for one in follows)
    assert read(store, other) == images(other)
    assert store.purge("secret.pdf") == 0


def test_a_source_noted_later_is_purged_as_well(store) -> None:
    names = put(store, 1)
    store.tag([one.key for one in names], ["late.txt"])
    assert store.purge("late.txt") == 3


def test_a_tenants_pages_can_be_purged(store) -> None:
    root = b"r" * 16
    names = chain(text(1), root)
    store.put_many(records(names, root))
    other = put(store, 1)
    assert store.purge_root(root) == 3
    assert read(store, names) == []
    assert read(store, other) == images(other)


def test_first_uses_are_remembered_and_forgotten_once_stored(store) -> None:
    names = chain(text(1))
    store.note_seen([one.key for one in names])
    store = reopened(store)
    assert set(store.seen()) == {one.key for one in names}
    put(store, 1)
    assert store.seen() == []
    store.close()


# --- two processes ---------------------------------------------------------------------------------------------------


def test_a_second_one_reads_only_and_says_so(store, caplog) -> None:
    names = put(store, 1)
    second = DiskStore(store.folder.parent, IDENTITY, QUOTA)
    assert "reads only" in caplog.text
    assert second.report().mode == "reading"
    assert read(second, names) == images(names)
    assert second.put_many(records(chain(text(2)))) == 0
    with pytest.raises(KVStoreError, match="cannot write to it"):
        second.purge("any")
    later = put(store, 3)
    assert read(second, later) == images(later)
    for seed in range(10, 60):  # the writer evicts and compacts under the reader
        put(store, seed)
        found = read(second, later)
        assert found == images(later[: len(found)])
    second.close()
    store.close()
    third = DiskStore(store.folder.parent, IDENTITY, QUOTA)
    assert third.is_writing
    third.close()


# --- a disk that fails -----------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KVStoreError, match="cannot be used as a directory to write to"):
        DiskStore(tmp_path / "file" / "store", IDENTITY, QUOTA)
    with pytest.raises(KVStoreError, match="cannot be used as a directory to write to"):
        DiskStore(Path("/proc/self/store"), IDENTITY, QUOTA)


FULL = """
import logging, resource, sys
from pathlib import Path
from exl2_rag.llm.kv_store.disk_store import DiskStore
from tests.llm.kv_store.pages import IDENTITY, chain, image_of, records, text

logging.basicConfig(level=logging.WARNING)
store = DiskStore(Path(sys.argv[1]), IDENTITY, 10**9)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for seed in range(40):
    store.put_many(records(chain(text(seed))))
    store.flush()
found = 0
for seed in range(40):
    names = chain(text(seed))
    for name, image in zip(names, store.get_many(names)):
        assert bytes(image) == image_of(name.key)
        found += 1
report = store.report()
assert report.off_because and "File too large" in report.off_because or "disk" in report.off_because, report
assert report.dropped_pages + report.written_pages == 120, report
assert found == report.written_pages == report.pages > 10, (found, report)
store.close()
"""


def test_a_full_disk_stops_writing_with_one_warning_and_reading_goes_on(tmp_path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("cannot be written to any more") == 1, run.stderr
    store = DiskStore(tmp_path, IDENTITY, 10**9)
    names = chain(text(0))
    assert read(store, names) == images(names)
    store.close()


def test_a_slow_disk_drops_pages_instead_of_keeping_callers_waiting(tmp_path, monkeypatch) -> None:
    store = DiskStore(tmp_path, IDENTITY, QUOTA)
    writer = store._writer
    assert writer is not None
    writer._queue_bytes = 4 * IMAGE_BYTES
    import threading

    gate = threading.Event()
    writer.later(gate.wait)
    accepted = sum(store.put_many(records(chain(text(seed)))) for seed in range(4))
    assert accepted == 4
    assert not store.has_room
    told = []
    store.on_room(lambda: told.append(True))
    gate.set()
    store.flush()
    assert store.has_room
    assert told
    assert store.report().dropped_pages == 8
    store.close()

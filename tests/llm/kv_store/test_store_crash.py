"""A process killed without warning while it writes: the next one finds every page whole, or not at all."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exl2_rag.llm.kv_store.disk_store import DiskStore
from exl2_rag.llm.kv_store.segment import record_bytes
from exl2_rag.llm.kv_store.store_directory import segments
from tests.llm.kv_store.pages import IDENTITY, IMAGE_BYTES, TABLE, chain, image_of, records, text

QUOTA = 40 * record_bytes(IMAGE_BYTES)
N_TEXTS = 24
LAST = 99
ROOT = Path(__file__).parents[3]

# Writes texts in rounds, evicts some, purges some; kills itself before or after the n-th call of a given function.
KILLED = """
import os, signal, sys
from pathlib import Path
from exl2_rag.llm.kv_store import disk_store, segment, segment_space, store_directory, store_index, store_writer
from tests.llm.kv_store.pages import IDENTITY, chain, records, text

directory, quota, where, when, count = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
owner_name, name = where.rsplit(".", 1)
owner = eval(owner_name)
original = getattr(owner, name)
calls = 0

def killing(*args, **kwargs):
    global calls
    calls += 1
    if calls == count and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if calls == count and when == "half":  # part of the bytes, as when the power fails
        file, parts, offset = args
        os.pwrite(file, b"".join(bytes(part) for part in parts)[: 4096 + 1000], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, killing)
store = disk_store.DiskStore(directory, IDENTITY, quota)
for seed in range(24):
    names = chain(text(seed))
    store.put_many(records(names, sources=(f"source {seed % 4}",)))
    store.flush()
    print(seed, flush=True)
    if seed % 5 == 4:
        store.evict([chain(text(seed - 2))[1].key])
        print("evicted", seed - 2, flush=True)
    if seed % 8 == 7:
        print("purging", seed % 4, flush=True)
        store.purge(f"source {seed % 4}")
        print("purged", seed % 4, flush=True)
store.close()
print("was not killed")
"""


def check(directory: Path, output: str) -> int:
    """The store opens, gives only true pages, and can be written to; how many pages it gave."""
    store = DiskStore(directory, IDENTITY, QUOTA)
    n_given = 0
    for seed in (*range(N_TEXTS), LAST):
        names = chain(text(seed))
        for name, image in zip(names, store.get_many(names), strict=False):
            assert bytes(image) == image_of(name.key)
            n_given += 1
    assert store.report().damaged_pages == 0, "a row was written before its bytes"
    rows = store._written_index.pages()
    keys = {row.name.key for row in rows}
    assert all(row.name.parent_key in keys or row.name.parent_key == TABLE.root_key for row in rows)
    assert len(rows) == n_given
    assert sum(path.stat().st_size for path in segments(store.folder).values()) <= QUOTA
    purged = [line.split()[1] for line in output.splitlines() if line.startswith("purged")]
    done = [int(line) for line in output.splitlines() if line.isdecimal()]
    left = b"".join(path.read_bytes() for path in segments(store.folder).values())
    for source in purged:  # what was said to be erased is erased
        before = next(n for n in range(7, 24, 8) if n % 4 == int(source))
        for seed in range(int(source), min(before, max(done)) + 1, 4):
            for name in chain(text(seed)):
                assert bytes(image_of(name.key)) not in left
    names = chain(text(LAST))
    store.put_many(records(names))
    store.flush()
    assert [bytes(one) for one in store.get_many(names)] == [bytes(image_of(one.key)) for one in names]
    store.close()
    return n_given


@pytest.mark.parametrize(
    ("where", "when", "count"),
    [
        ("segment._write_all", "half", 5),
        ("segment._write_all", "after", 9),
        ("segment.SegmentWriter.sync", "before", 2),
        ("segment.SegmentWriter.sync", "after", 11),
        ("store_index.StoreIndex.insert", "before", 3),
        ("store_index.StoreIndex.insert", "after", 12),
        ("store_index.StoreIndex.take_segment_number", "after", 1),
        ("store_index.StoreIndex.take_segment_number", "after", 6),
        ("store_index.StoreIndex.move", "before", 1),
        ("store_index.StoreIndex.move", "after", 2),
        ("segment_space.SegmentSpace._remove", "before", 1),
        ("segment_space.SegmentSpace._remove", "after", 2),
        ("store_index.StoreIndex.delete", "after", 1),
        ("segment_space.SegmentSpace.erase_dead", "before", 1),
        ("segment_space.SegmentSpace.erase_dead", "after", 2),
        ("store_index.StoreIndex.note_erased", "after", 1),
    ],
)
def test_a_writer_killed_at_any_point_leaves_whole_pages_only(tmp_path, where, when, count) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(QUOTA), where, when, str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stdout + run.stderr
    check(tmp_path, run.stdout)


def test_a_writer_killed_again_and_again_at_random_moments_leaves_whole_pages_only(tmp_path) -> None:
    rng = random.Random(7)
    n_given = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(QUOTA), "segment.sync_directory", "before", "-1"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(rng.random() * 0.2)
        process.kill()
        rest, _ = process.communicate()
        n_given += check(tmp_path, first + rest)
    assert n_given > 0


def test_a_purge_that_was_cut_short_is_finished_by_the_next_writer(tmp_path) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED,
            str(tmp_path),
            str(QUOTA),
            "segment_space.SegmentSpace.erase_dead",
            "before",
            "1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    assert "purging 3" in run.stdout
    assert "purged" not in run.stdout

    def left() -> bytes:
        return b"".join(path.read_bytes() for path in segments(tmp_path / IDENTITY.folder_name).values())

    secrets = [bytes(image_of(one.key)) for seed in (3, 7) for one in chain(text(seed))]
    assert any(secret in left() for secret in secrets), "nothing was left to erase, so the test proves nothing"
    DiskStore(tmp_path, IDENTITY, QUOTA).close()
    assert not any(secret in left() for secret in secrets)

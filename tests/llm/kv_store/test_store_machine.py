"""Random operations on a store beside a dict that does the same: the store may know less, never something else."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from exl2_rag.llm.kv_store.disk_store import DiskStore
from exl2_rag.llm.kv_store.page_store import PageName
from exl2_rag.llm.kv_store.segment import record_bytes
from exl2_rag.llm.kv_store.store_directory import StoreIdentity, segments
from tests.llm.kv_store.pages import PAGE_SIZE, TABLE, chain, image_of, records

IMAGE_BYTES = 300
IDENTITY = StoreIdentity(b"\x05" * 32, PAGE_SIZE, IMAGE_BYTES)
QUOTA = 24 * record_bytes(IMAGE_BYTES)
# Few tokens, so that texts share their beginnings.
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(lambda pages: [one for one in pages for _ in range(4)])
SOURCES = st.sampled_from(["a", "b"])


class StoreMachine(RuleBasedStateMachine):
    """`model`: every page that was ever put and not evicted, purged or damaged since, with its sources."""

    @initialize()
    def make(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.model: dict[PageName, set[str]] = {}
        self.store = DiskStore(self.directory, IDENTITY, QUOTA)

    @rule(tokens=TEXTS, sources=st.sets(SOURCES), recompute_s=st.floats(0, 10))
    def put(self, tokens: list[int], sources: set[str], recompute_s: float) -> None:
        names = chain(tokens)
        present = self.store.contains([one.key for one in names])
        self.store.put_many(
            [
                type(one)(one.name, one.root_key, image_of(one.name.key, IMAGE_BYTES), recompute_s, tuple(sources))
                for one in records(names)
            ]
        )
        self.store.flush()
        for name in names:
            if name.key not in present:
                self.model[name] = set(sources)
        assert self.store.contains([one.key for one in names]) == {one.key for one in names}

    @rule(tokens=TEXTS)
    def get(self, tokens: list[int]) -> None:
        names = chain(tokens)
        found = 0
        for name, image in zip(names, self.store.get_many(names), strict=False):
            assert bytes(image) == image_of(name.key, IMAGE_BYTES)
            assert name in self.model
            found += 1
        assert found == len(self.store.contains([one.key for one in names]))  # no gaps, none unreadable

    @rule(tokens=TEXTS)
    def touch(self, tokens: list[int]) -> None:
        self.store.touch([one.key for one in chain(tokens)])

    @rule(tokens=TEXTS, source=SOURCES)
    def tag(self, tokens: list[int], source: str) -> None:
        names = chain(tokens)
        present = self.store.contains([one.key for one in names])
        self.store.tag([one.key for one in names], [source])
        for name in names:
            if name.key in present:
                self.model[name].add(source)

    @rule(tokens=TEXTS)
    def evict(self, tokens: list[int]) -> None:
        self._forget({chain(tokens)[-1]})
        self.store.evict([chain(tokens)[-1].key])

    @rule(source=SOURCES)
    def purge(self, source: str) -> None:
        gone = self._forget({name for name, sources in self.model.items() if source in sources})
        self.store.purge(source)
        left = b"".join(path.read_bytes() for path in segments(self.store.folder).values())
        for name in gone:
            assert bytes(image_of(name.key, IMAGE_BYTES)) not in left

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = DiskStore(self.directory, IDENTITY, QUOTA)
        assert self.store.report().damaged_pages == 0

    @rule(bit=st.integers(0, 7), place=st.integers(0, 10**9))
    def damage(self, bit: int, place: int) -> None:
        files = sorted(segments(self.store.folder).values())
        if not files or not files[-1].stat().st_size:
            return
        path = files[place % len(files)]
        if not path.stat().st_size:
            return
        offset = place % path.stat().st_size // 4096 * 4096 + place % 64
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << bit]))
        self.store.verify()

    @invariant()
    def holds_nothing_else_and_keeps_its_promises(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.flush()
        keys = {name.key for name in self.model}
        rows = self.store._written_index.pages()
        stored = {row.name.key for row in rows}
        assert stored <= keys
        assert all(row.name.parent_key in stored or row.name.parent_key == TABLE.root_key for row in rows)
        assert sum(path.stat().st_size for path in segments(self.store.folder).values()) <= QUOTA

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.directory)

    def _forget(self, names: set[PageName]) -> set[PageName]:
        doomed = set(names)
        while True:
            keys = {one.key for one in doomed}
            more = {name for name in self.model if name.parent_key in keys} - doomed
            if not more:
                break
            doomed |= more
        for name in doomed:
            self.model.pop(name, None)
        return doomed


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)

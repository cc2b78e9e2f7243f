"""The engine fuzz with both tiers below it, over several restarts and a disk that is damaged and evicted meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.kv_store.disk_store import DiskStore
from exl2_rag.llm.kv_store.ram_tier import RamTier
from exl2_rag.llm.kv_store.segment import record_bytes
from exl2_rag.llm.kv_store.store_directory import StoreIdentity, segments
from exl2_rag.llm.kv_store.tiers import CacheTiers
from tests.support.engine_fuzz import EngineFuzz

PAGE_SIZE = 4
PAGE_BYTES = 2 * 4 * PAGE_SIZE
IDENTITY = StoreIdentity(b"\x09" * 32, PAGE_SIZE, PAGE_BYTES)


class TieredFuzz(EngineFuzz):
    def __init__(self, seed: int, directory: Path, store_pages: int) -> None:
        def tiers(cache: KVCache) -> CacheTiers:
            store = DiskStore(directory, IDENTITY, store_pages * record_bytes(PAGE_BYTES))
            return CacheTiers(cache, PAGE_SIZE, ram=RamTier(25 * PAGE_BYTES, PAGE_BYTES), store=store)

        super().__init__(seed, make_tiers=tiers, n_pages=30)
        self.store = self.engine.tiers.store
        self._operations |= {self.evict_from_disk: 6, self.damage_disk: 12, self.wait_for_disk: 10}

    def evict_from_disk(self) -> None:
        keys = self.store._written_index.keys()
        if keys:
            self.store.evict([self.random.choice(keys)])

    def damage_disk(self) -> None:
        for path in segments(self.store.folder).values():
            try:
                file = path.open("r+b")
            except FileNotFoundError:  # the writer has just given this segment up
                continue
            with file:
                file.seek(self.random.randrange(max(1, path.stat().st_size)) // 4096 * 4096 + self.random.randrange(32))
                file.write(self.random.randbytes(1))

    def wait_for_disk(self) -> None:
        self.engine.tiers.flush()


@pytest.mark.parametrize(("seed", "store_pages", "slice_s"), [(1, 2000, 0.02), (2, 60, 0.0)])
def test_random_operations_over_all_tiers_mix_nothing_up(tmp_path, monkeypatch, seed, store_pages, slice_s) -> None:
    monkeypatch.setattr("exl2_rag.llm.kv_store.tier_loader.LOAD_SLICE_S", slice_s)
    monkeypatch.setattr("exl2_rag.llm.kv_store.rates.PROBE_EVERY", 1)  # the toy computes faster than any disk reads
    ram_tokens = disk_tokens = 0
    for _ in range(3):
        fuzz = TieredFuzz(seed, tmp_path, store_pages)  # the same prefixes each time
        fuzz.run(400, drain_every=200)
        report = fuzz.engine.report().tiers
        fuzz.engine.close()
        ram_tokens += report.ram_tokens
        disk_tokens += report.disk_tokens
        assert fuzz.counts["damage_disk"] > 0
        assert report.store.off_because is None
    assert ram_tokens > 0
    assert disk_tokens > 0

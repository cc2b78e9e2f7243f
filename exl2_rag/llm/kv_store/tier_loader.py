"""Brings pages back from host memory and disk into the page table, page by page from the head of a chain on."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from exl2_rag.llm.kv_store.page_store import PageName, PageStore
from exl2_rag.llm.kv_store.ram_tier import RamTier
from exl2_rag.llm.kv_store.rates import LoadOrRecompute
from exl2_rag.llm.page_table import HeldPages, PageTable

LOAD_SLICE_S = 0.02
"""Loading beside running requests takes no longer than this in one step."""


class PageImages(Protocol):
    """The KV cache as bytes; `exl2_rag.llm.kv_cache.KVCache` is one."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page's image."""
        ...

    def read_page(self, index: int) -> bytearray:
        """The image of a page."""
        ...

    def write_page(self, index: int, image: bytearray | memoryview) -> None:
        """Put an image back."""
        ...


@dataclass(slots=True)
class Loaded:
    """What one call brought back.

    Attributes:
        ram_pages, disk_pages: how many from where.
        sources: documents of those pages, as far as they are known.
        out_of_time: there may be more.
        seconds: it took.
    """

    ram_pages: int
    disk_pages: int
    sources: dict[bytes, frozenset[str]]
    out_of_time: bool = False
    seconds: float = 0.0

    @property
    def pages(self) -> int:
        """From both."""
        return self.ram_pages + self.disk_pages


class PageLoader:
    """Loads pages. Arguments as for `CacheTiers`; `rates` learns how fast the disk is."""

    def __init__(
        self,
        images: PageImages,
        page_size: int,
        ram: RamTier | None,
        store: PageStore | None,
        rates: LoadOrRecompute,
    ) -> None:
        self.n_declined = 0  # pages that would have taken longer to load than to compute
        self._images = images
        self._page_size = page_size
        self._ram = ram
        self._store = store
        self._rates = rates

    def load(
        self,
        table: PageTable,
        held: HeldPages,
        names: Seq[PageName],
        carry_out_copies: Callable[[], None],
        *,
        others_run: bool,
    ) -> Loaded:
        """Append pages to `held` as far as they can be had, and commit them.

        Args:
            names: the pages that follow those that are held.
            carry_out_copies: called before a page is written to.
            others_run: stop after `LOAD_SLICE_S`, but not before one page.
        """
        started = time.perf_counter()
        deadline = started + LOAD_SLICE_S if others_run else float("inf")
        loaded = Loaded(0, 0, {})

        def put_back(name: PageName, image: memoryview) -> None:
            carry_out_copies()
            self._images.write_page(held.pages[-1], image)
            table.commit(held, name.token_ids)

        def make_room() -> bool:
            wanted = held.n_tokens + self._page_size
            return table.extend(held, wanted) == wanted

        while loaded.pages < len(names):
            rest = names[loaded.pages :]
            in_ram = self._ram is not None and self._ram.get(rest[0]) is not None
            run = self._run_of(rest, in_ram=in_ram)
            load = self._load_from_ram if in_ram else self._load_from_disk
            if load(loaded, run, make_room, put_back, deadline) < len(run):
                loaded.out_of_time = time.perf_counter() >= deadline
                break
        loaded.seconds = time.perf_counter() - started
        return loaded

    def _run_of(self, names: Seq[PageName], *, in_ram: bool) -> Seq[PageName]:
        """The leading names that are in host memory, or that are not."""
        for place, name in enumerate(names):
            if (self._ram is not None and name.key in self._ram) != in_ram:
                return names[:place] or names[:1]
        return names

    def _load_from_ram(
        self,
        loaded: Loaded,
        names: Seq[PageName],
        make_room: Callable[[], bool],
        put_back: Callable[[PageName, memoryview], None],
        deadline: float,
    ) -> int:
        assert self._ram is not None
        self._ram.touch([name.key for name in names])
        for place, name in enumerate(names):
            # Making room comes first: what is evicted for it goes to host memory, and may displace another image there.
            if (loaded.pages and time.perf_counter() >= deadline) or not make_room():
                return place
            image = self._ram.get(name)
            if image is None:
                return place
            put_back(name, image)
            loaded.sources[name.key] = self._ram.sources(name.key)
            loaded.ram_pages += 1
        return len(names)

    def _load_from_disk(
        self,
        loaded: Loaded,
        names: Seq[PageName],
        make_room: Callable[[], bool],
        put_back: Callable[[PageName, memoryview], None],
        deadline: float,
    ) -> int:
        if self._store is None:
            return 0
        stored = self._store.contains([name.key for name in names])
        n_stored = next((place for place, name in enumerate(names) if name.key not in stored), len(names))
        if n_stored == 0:
            return 0
        if not self._rates.should_load(self._images.page_bytes, self._page_size):
            self.n_declined += n_stored
            return 0
        n_loaded = 0
        started = time.perf_counter()
        for name, image in zip(names[:n_stored], self._store.get_many(names[:n_stored]), strict=False):
            if not make_room():
                break
            put_back(name, image)
            n_loaded += 1
            if time.perf_counter() >= deadline:
                break
        loaded.disk_pages += n_loaded
        loaded.sources.update(self._store.sources_of([name.key for name in names[:n_loaded]]))
        self._rates.disk.measured(n_loaded * self._images.page_bytes, time.perf_counter() - started)
        return n_loaded

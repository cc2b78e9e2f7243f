"""What the engine talks to: pages come back from host memory or disk at admission, and go there when it pays.

    evicted from the KV cache  ->  host memory
    used a second time, warmed or pinned  ->  disk, through a queue; the first use of a page is only noted down
    wanted by a request that is being admitted  ->  back, page by page from the chain's head on, into the page table

What cannot be had, or would take longer to load than to compute, is computed. No request fails or waits because of the
tiers: beside running requests a step loads for a short while only, and the request that wants more waits its turn. For
the engine's thread alone. Knows page keys, tokens and bytes; no tensors.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from exl2_rag.llm.kv_store.page_store import PageName, PageRecord, PageStore
from exl2_rag.llm.kv_store.ram_tier import RamTier
from exl2_rag.llm.kv_store.rates import LoadOrRecompute
from exl2_rag.llm.kv_store.tier_loader import Loaded, PageImages, PageLoader
from exl2_rag.llm.kv_store.tier_report import TierPeek, TierReport
from exl2_rag.llm.page_table import Page, PageTable
from exl2_rag.llm.sequence import Sequence

SAVE_SLICE_S = 0.005
"""Copying pages out for the disk takes no longer than this in a step in which others run."""
MAX_SEEN = 65536
MAX_TO_SAVE = 16384
CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class _ToSave:
    """A page that is to be written to disk."""

    name: PageName
    root_key: bytes


class CacheTiers:
    """The tiers below one KV cache; at least one of them.

    Args:
        images: the KV cache as bytes.
        page_size: tokens on a page.
    """

    def __init__(self, images: PageImages, page_size: int, *, ram: RamTier | None, store: PageStore | None) -> None:
        self.rates = LoadOrRecompute()
        self.ram = ram
        self.store = store
        self._images = images
        self._page_size = page_size
        self._table: PageTable | None = None
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # computed once, not stored
        self._to_save: OrderedDict[bytes, _ToSave] = OrderedDict()  # parents before their children
        self._sources: dict[bytes, frozenset[str]] = {}  # of pages in the page table
        self._pinned: Counter[bytes] = Counter()  # pages that pins hold, by how many
        self._purged: set[bytes] = set()  # pages that running requests held when their document was purged
        self._ram_tokens = 0
        self._disk_tokens = 0
        self._load_s = 0.0
        self._spent_s = 0.0
        self._loader = PageLoader(images, page_size, ram, store, self.rates)
        self._n_skipped = 0
        if store is not None:
            self._seen.update(dict.fromkeys(store.seen()))

    @property
    def has_work(self) -> bool:
        """Whether `save_some` would do anything."""
        return bool(self._to_save) and self.store is not None and self.store.has_room

    def attach(self, table: PageTable) -> None:
        """Work with this page table from now on; what another held is gone."""
        self._table = table
        self._to_save.clear()
        self._sources.clear()
        self._pinned.clear()
        self._purged.clear()
        table.on_evict = self._keep_evicted

    # --- requests come -----------------------------------------------------------------------------------------------

    def restore(self, sequence: Sequence, carry_out_copies: Callable[[], None], *, others_run: bool) -> bool:
        """Bring back what a sequence that is about to be admitted can use, into the page table.

        Args:
            carry_out_copies: carries out the copies planned so far; called before a page is written to.
            others_run: do not take long.

        Returns:
            Whether the sequence can be admitted now; False asks for another call in the next step.
        """
        table = self._attached()
        keys = sequence.page_keys
        n_wanted = sequence.reuse_limit // self._page_size
        match = table.lookup(sequence.token_ids, n_wanted * self._page_size, keys, sequence.cache_root)
        n_there = len(match.pages)
        # A sequence whose restored pages are evicted again before it is admitted must not come back for ever.
        if n_there < n_wanted and sequence.n_restored_pages < n_wanted:
            names = self._names(sequence, n_there, n_wanted)
            held = table.hold(sequence.token_ids, n_there * self._page_size, keys, sequence.cache_root)
            try:
                loaded = self._loader.load(table, held, names, carry_out_copies, others_run=others_run)
                n_there = len(held.keys)
            finally:
                table.release(held)
            self._count(sequence, loaded)
            if loaded.out_of_time:
                return False
        sequence.n_noted_pages = n_there
        if sequence.n_cached_tokens is None:
            self._used(sequence, keys[:n_there])
        return True

    def peek(self, token_ids: Seq[int], limit: int, root: bytes) -> TierPeek:
        """What a prompt would find here, of its first `limit` tokens. Reads no page and changes nothing."""
        table, size = self._attached(), self._page_size
        keys: list[bytes] = []
        n_there = len(table.lookup(token_ids, limit // size * size, keys, root).pages)
        names = self._chain(token_ids, keys, root, n_there, limit // size)
        in_ram = {name.key for name in names if self.ram is not None and self.ram.get(name) is not None}
        stored = set() if self.store is None else self.store.contains([name.key for name in names])
        n_ram = n_disk = 0
        for name in names:
            if name.key not in in_ram and name.key not in stored:
                break
            n_ram += name.key in in_ram
            n_disk += name.key not in in_ram
        return TierPeek(n_there * size, n_ram * size, n_disk * size)

    def chain_end(self, token_ids: Seq[int], n_tokens: int, root: bytes) -> bytes:
        """The key of the last page of the first `n_tokens` tokens, whole pages; without any, the root."""
        keys: list[bytes] = []
        self._chain(token_ids, keys, root, 0, n_tokens // self._page_size)
        return keys[-1] if keys else root

    def computed(self, sequence: Sequence) -> None:
        """Pages of a running sequence may have become full: a first use of them, or a second."""
        assert sequence.held is not None
        keys = sequence.held.keys
        if len(keys) <= sequence.n_noted_pages:
            sequence.n_noted_pages = len(keys)  # fewer after tokens were taken back
            return
        places = range(sequence.n_noted_pages, len(keys))
        sequence.n_noted_pages = len(keys)
        self._note_sources(sequence, keys, places)
        if self.store is None or not self.store.is_writing:
            return
        again = [place for place in places if keys[place] in self._seen]
        first = [keys[place] for place in places if keys[place] not in self._seen]
        if first:
            self._seen.update(dict.fromkeys(first))
            while len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)
            self.store.note_seen(first)
        if again:  # with what comes before, which is used at least as often, and without which it is of no use
            self._save(sequence, range(again[-1] + 1))

    def finished(self, sequence: Sequence) -> None:
        """A sequence is about to end, its pages still held; if it was to warm the cache, they go to disk."""
        is_warming = sequence.max_new_tokens == 0 and sequence.evaluation is None
        if is_warming and sequence.held is not None and self.store is not None and self.store.is_writing:
            self._save(sequence, range(len(sequence.held.keys)))
            if sequence.keep_pages:
                self._pinned.update(sequence.held.keys)
                self.store.set_pinned(list(sequence.held.keys), pinned=True)

    def unpinned(self, sequence: Sequence) -> None:
        """A sequence that kept its pages is about to let go of them."""
        if self.store is None or sequence.held is None:
            return
        self._pinned.subtract(sequence.held.keys)
        free = [key for key in sequence.held.keys if self._pinned[key] <= 0]
        for key in free:
            del self._pinned[key]
        self.store.set_pinned(free, pinned=False)

    # --- pages go ----------------------------------------------------------------------------------------------------

    def save_some(self, *, others_run: bool) -> None:
        """Copy pages that are to be written to disk out of the cache; for a short while if others run."""
        table = self._attached()
        if self._purged:
            table.discard(self._purged)
            self._purged = {key for key in self._purged if table.find(key) is not None}
        started = time.perf_counter()
        deadline = started + SAVE_SLICE_S * (1 if others_run else 10)
        while self.has_work and self.store is not None and time.perf_counter() < deadline:
            key, wanted = self._to_save.popitem(last=False)
            index = table.find(key)
            image: bytearray | None = None
            if index is not None:
                image = self._images.read_page(index)
            elif self.ram is not None and (kept := self.ram.get(wanted.name)) is not None:
                image = bytearray(kept)
            if image is None:
                self._n_skipped += 1
                continue
            sources = tuple(sorted(self._sources.get(key, ())))
            recompute_s = self.rates.recompute_s(self._page_size)
            is_pinned = self._pinned[key] > 0
            self.store.put_many([PageRecord(wanted.name, wanted.root_key, image, recompute_s, sources, is_pinned)])
            self._seen.pop(key, None)
        self._spent_s += time.perf_counter() - started

    def take_spent_s(self) -> float:
        """Seconds spent on loading and copying since the last call."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    def purge_memory(self, source: str) -> int:
        """Forget what was made from a source in the KV cache and in host memory; returns how many pages are gone.

        Nothing of it goes to disk any more; what is there is for `PageStore.purge`, which any thread may call. Pages of
        requests that run now stay in the KV cache until those end.
        """
        table = self._attached()
        tagged = [key for key, sources in self._sources.items() if source in sources]
        n_pages = table.discard(tagged)
        for key in tagged:
            self._to_save.pop(key, None)
            if table.find(key) is None:
                del self._sources[key]
            else:
                self._purged.add(key)
        return n_pages if self.ram is None else n_pages + self.ram.purge(source)

    def report(self) -> TierReport:
        """What the tiers hold and have done."""
        n_tokens = self._ram_tokens + self._disk_tokens
        compute_s = self.rates.recompute_s(n_tokens)
        return TierReport(
            ram=None if self.ram is None else self.ram.report(),
            store=None if self.store is None else self.store.report(),
            ram_tokens=self._ram_tokens,
            disk_tokens=self._disk_tokens,
            load_s=self._load_s,
            saved_s=compute_s - self._load_s if compute_s else 0.0,
            declined_pages=self._loader.n_declined,
            skipped_saves=self._n_skipped,
            prefill_tokens_per_s=self.rates.prefill_tokens_per_s,
            disk_bytes_per_s=self.rates.disk.per_s,
        )

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write what is to be written, for `timeout_s` at most, and close the store. Idempotent."""
        if self.store is None:
            return
        deadline = time.perf_counter() + timeout_s
        self._save_all(self.store, deadline)
        self._n_skipped += len(self._to_save)
        self._to_save.clear()
        self.store.close(max(1.0, deadline - time.perf_counter()))

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Wait until what is to be written is on the disk, for about `timeout_s` at most."""
        if self.store is not None:
            self._save_all(self.store, time.perf_counter() + timeout_s)
            self.store.flush()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _attached(self) -> PageTable:
        assert self._table is not None, "attach() comes first"
        return self._table

    def _save_all(self, store: PageStore, deadline: float) -> None:
        while self._to_save and store.is_writing and time.perf_counter() < deadline:
            self.save_some(others_run=False)
            if self._to_save and not store.has_room:
                time.sleep(0.005)

    def _names(self, sequence: Sequence, start: int, end: int) -> list[PageName]:
        """The names of a sequence's pages from `start` to before `end`; completes its keys as far."""
        return self._chain(sequence.token_ids, sequence.page_keys, self._root(sequence), start, end)

    def _chain(self, token_ids: Seq[int], keys: list[bytes], root: bytes, start: int, end: int) -> list[PageName]:
        """The names of a text's pages from `start` to before `end`; appends to `keys`, which are those of its pages."""
        table, size = self._attached(), self._page_size
        names = []
        for place in range(min(start, len(keys)), end):
            parent_key = keys[place - 1] if place else root
            tokens = tuple(token_ids[place * size : (place + 1) * size])
            if place == len(keys):
                keys.append(table.page_key(parent_key, tokens))
            if place >= start:
                names.append(PageName(keys[place], parent_key, tokens))
        return names

    def _root(self, sequence: Sequence) -> bytes:
        return self._attached().root_key if sequence.cache_root is None else sequence.cache_root

    def _count(self, sequence: Sequence, loaded: Loaded) -> None:
        sequence.n_restored_pages += loaded.pages
        sequence.n_ram_tokens += loaded.ram_pages * self._page_size
        sequence.n_disk_tokens += loaded.disk_pages * self._page_size
        self._ram_tokens += loaded.ram_pages * self._page_size
        self._disk_tokens += loaded.disk_pages * self._page_size
        self._load_s += loaded.seconds if loaded.pages else 0.0
        self._spent_s += loaded.seconds
        self._sources.update(loaded.sources)

    def _used(self, sequence: Sequence, keys: Seq[bytes]) -> None:
        """A request takes these pages, the head of its chain, from the cache: a second use, at least."""
        if not keys:
            return
        self._note_sources(sequence, keys, range(len(keys)))
        if self.ram is not None:
            self.ram.touch(keys)
        if self.store is not None and self.store.is_writing:
            stored = self.store.contains(keys)
            if stored:
                self.store.touch([key for key in keys if key in stored])
            self._save(sequence, [place for place, key in enumerate(keys) if key not in stored])

    def _save(self, sequence: Sequence, places: Iterable[int]) -> None:
        """Have pages of a sequence written to disk, unless they are there."""
        assert self.store is not None
        places = list(places)
        self._names_known(sequence, places)
        keys = sequence.page_keys
        stored = self.store.contains([keys[place] for place in places])
        root = self._root(sequence)
        for place in places:
            if keys[place] in stored or keys[place] in self._to_save or keys[place] in self._purged:
                continue
            if len(self._to_save) >= MAX_TO_SAVE:
                self._n_skipped += 1
                continue
            token_ids = tuple(sequence.token_ids[place * self._page_size : (place + 1) * self._page_size])
            name = PageName(keys[place], keys[place - 1] if place else root, token_ids)
            self._to_save[name.key] = _ToSave(name, root)

    def _names_known(self, sequence: Sequence, places: Seq[int]) -> None:
        if places and len(sequence.page_keys) <= max(places):
            self._names(sequence, max(places) + 1, max(places) + 1)

    def _note_sources(self, sequence: Sequence, keys: Seq[bytes], places: Iterable[int]) -> None:
        """Remember which documents the text of these pages, or text before it, was taken from."""
        places = list(places)
        if len(self._sources) > 2 * self._attached().n_pages:  # some pages leave the table without being evicted
            self._sources = {key: one for key, one in self._sources.items() if self._attached().find(key) is not None}
        for source, first_token in sequence.sources:
            tagged = [keys[place] for place in places if (place + 1) * self._page_size > first_token]
            for key in tagged:
                self._sources[key] = self._sources.get(key, frozenset()) | {source}
            if self.ram is not None:
                self.ram.tag(tagged, [source])
            if self.store is not None and tagged:
                self.store.tag(tagged, [source])

    def _keep_evicted(self, page: Page) -> None:
        """The page table is about to give a page's place to another: its image goes to host memory."""
        if page.key is None:
            return
        sources = self._sources.pop(page.key, frozenset())
        if self.ram is None or page.key in self._purged:
            return
        if page.key in self.ram:
            self.ram.touch([page.key])
            return
        name = PageName(page.key, page.parent_key, tuple(page.token_ids))
        self.ram.put(name, page.root, self._images.read_page(page.index), sources)

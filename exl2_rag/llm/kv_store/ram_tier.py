"""Page images in host memory, within a budget of bytes; the page used least recently goes first.

Filled when pages are evicted from the KV cache. A page that goes back to the cache also stays here, so evicting it
again costs nothing. Within a chain the tail counts as used before its head, so that heads stay longest: a page can only
be used if everything before it is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from exl2_rag.llm.kv_store.page_store import PageName

SLAB_BYTES = 64 * 2**20
"""Memory is taken in pieces of this size, as it fills up."""


@dataclass(frozen=True, slots=True)
class RamReport:
    """The state of the tier. `stored_pages` and `evicted_pages` count since it was made."""

    pages: int
    used_bytes: int
    budget_bytes: int
    stored_pages: int
    evicted_pages: int


@dataclass(slots=True)
class _Slot:
    """Where an image lies, and what it is an image of."""

    name: PageName
    root_key: bytes
    image: memoryview
    sources: frozenset[str]


class RamTier:
    """Keeps up to `budget_bytes` of page images.

    Args:
        image_bytes: bytes of one image; all are the same.
    """

    def __init__(self, budget_bytes: int, image_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.capacity = budget_bytes // image_bytes
        self.n_stored = 0
        self.n_evicted = 0
        self._image_bytes = image_bytes
        self._slots: OrderedDict[bytes, _Slot] = OrderedDict()  # least recently used first
        self._free: list[memoryview] = []
        self._n_made = 0

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def get(self, name: PageName) -> memoryview | None:
        """The image of a page, valid until the next `put`; None unless key, parent and all tokens agree."""
        slot = self._slots.get(name.key)
        return slot.image if slot is not None and slot.name == name else None

    def put(self, name: PageName, root_key: bytes, image: bytearray | memoryview, sources: Iterable[str] = ()) -> None:
        """Keep an image, in place of the one used least recently if there is no room."""
        if name.key in self._slots or not self.capacity:
            self.touch([name.key])
            return
        target = self._take_memory()
        target[:] = image
        self._slots[name.key] = _Slot(name, root_key, target, frozenset(sources))
        self.n_stored += 1

    def touch(self, chain: Seq[bytes]) -> None:
        """Pages of one chain, in order, were used just now."""
        for key in reversed(chain):
            if key in self._slots:
                self._slots.move_to_end(key)

    def sources(self, key: bytes) -> frozenset[str]:
        """The sources that are known of a page that is here."""
        return self._slots[key].sources

    def tag(self, keys: Iterable[bytes], sources: Iterable[str]) -> None:
        """Note sources of pages that are here."""
        for key in keys:
            slot = self._slots.get(key)
            if slot is not None:
                slot.sources |= frozenset(sources)

    def purge(self, source: str) -> int:
        """Overwrite every page made from a source, and what follows it; returns how many."""
        return self._drop_with_descendants(key for key, slot in self._slots.items() if source in slot.sources)

    def purge_root(self, root_key: bytes) -> int:
        """Overwrite every page whose chain begins there; returns how many."""
        return self._drop_with_descendants(key for key, slot in self._slots.items() if slot.root_key == root_key)

    def report(self) -> RamReport:
        """The state of the tier."""
        n_bytes = self._n_made * self._image_bytes
        return RamReport(len(self._slots), n_bytes, self.budget_bytes, self.n_stored, self.n_evicted)

    def _take_memory(self) -> memoryview:
        if not self._free and self._n_made < self.capacity:
            n_images = min(max(1, SLAB_BYTES // self._image_bytes), self.capacity - self._n_made)
            slab = memoryview(bytearray(n_images * self._image_bytes))
            self._free += [slab[start : start + self._image_bytes] for start in range(0, len(slab), self._image_bytes)]
            self._n_made += n_images
        if self._free:
            return self._free.pop()
        self.n_evicted += 1
        return self._slots.popitem(last=False)[1].image

    def _drop_with_descendants(self, keys: Iterable[bytes]) -> int:
        dropped = set(keys)
        is_growing = bool(dropped)
        while is_growing:
            children = {key for key, slot in self._slots.items() if slot.name.parent_key in dropped} - dropped
            dropped |= children
            is_growing = bool(children)
        for key in dropped:
            image = self._slots.pop(key).image
            image[:] = bytes(len(image))
            self._free.append(image)
        return len(dropped)

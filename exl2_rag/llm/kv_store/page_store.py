"""What the engine wants of a store of pages. Knows page keys, token ids and bytes; no tensors and no files."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PageName:
    """Everything that must agree before a page's bytes may be used.

    Attributes:
        key: the page's key in the page table, which stands for the identity of model, cache and tenant, and for every
            token up to the page's end.
        parent_key: key of the page before it, or the root.
        token_ids: the tokens on the page.
    """

    key: bytes
    parent_key: bytes
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PageRecord:
    """A page to be kept.

    Attributes:
        root_key: where its chain begins; the same for all pages of a tenant.
        image: the page's bytes; belongs to the store from now on.
        recompute_s: seconds it would take to compute the page again.
        sources: ids of the documents that its text, or text before it, was taken from.
        is_pinned: exempt from eviction, until that is taken back or the process ends.
    """

    name: PageName
    root_key: bytes
    image: bytearray
    recompute_s: float
    sources: tuple[str, ...] = ()
    is_pinned: bool = False


class PageStore(Protocol):
    """Keeps page images by name. No method raises because of what the store holds or where it lies.

    What is damaged, of another format, or cannot be read is as if it had never been stored.
    """

    def contains(self, keys: Seq[bytes]) -> set[bytes]:
        """Which of these are stored, as far as can be said without reading them."""
        ...

    def get_many(self, names: Seq[PageName]) -> Iterator[memoryview]:
        """The images of a chain's pages in order, up to the first that is missing or not sound.

        Each image is valid until the next one is asked for.
        """
        ...

    def put_many(self, records: Seq[PageRecord]) -> int:
        """Keep pages, parents before their children; returns how many were accepted. Does not wait for the disk."""
        ...

    def evict(self, keys: Seq[bytes]) -> int:
        """Drop pages and what follows them; returns how many pages are gone."""
        ...

    def purge(self, source: str) -> int:
        """Erase every page made from a source, and what follows it; returns how many pages are gone."""
        ...

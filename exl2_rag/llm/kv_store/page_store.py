"""What the engine wants of a store of pages. Knows page keys, token ids and bytes; no tensors and no files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class StoreReport:
    """The state of a store on disk. Counts are since it was opened.

    Attributes:
        mode: "writing", "reading" (another process writes), or "off".
        off_because: why it no longer writes or reads; None while it does.
        pages, live_bytes, file_bytes: present contents; dead bytes are the difference.
        quota_bytes: what the files may take.
        read_pages, read_bytes, read_s: given out.
        written_pages: new ones.
        dropped_pages: not kept, because the disk was too slow, full, or their parents were gone.
        damaged_pages: found not to be what they should be; deleted and computed again.
        evicted_pages, purged_pages: made room, or erased on request.
    """

    mode: str
    off_because: str | None
    pages: int
    live_bytes: int
    file_bytes: int
    quota_bytes: int
    read_pages: int
    read_bytes: int
    read_s: float
    written_pages: int
    dropped_pages: int
    damaged_pages: int
    evicted_pages: int
    purged_pages: int


class PageStore(ABC):
    """Keeps page images by name. Whoever plugs in another one writes the five abstract methods; the rest is optional.

    No reading method raises because of what the store holds or where it lies: what is damaged, of another format, or
    cannot be read is as if it had never been stored. Images are given out only under the very name they were put under.
    """

    @abstractmethod
    def contains(self, keys: Seq[bytes]) -> set[bytes]:
        """Which of these are stored, as far as can be said without reading them."""

    @abstractmethod
    def get_many(self, names: Seq[PageName]) -> Iterator[memoryview]:
        """The images of a chain's pages in order, up to the first that is missing or not sound.

        Each image is valid until the next one is asked for.
        """

    @abstractmethod
    def put_many(self, records: Seq[PageRecord]) -> int:
        """Keep pages, parents before their children; returns how many were accepted. Does not wait for the disk."""

    @abstractmethod
    def evict(self, keys: Seq[bytes]) -> int:
        """Drop pages and what follows them; returns how many pages are gone."""

    @abstractmethod
    def purge(self, source: str) -> int:
        """Erase every page made from a source, and what follows it; returns how many pages are gone.

        Raises:
            KVStoreError: that cannot be done.
        """

    def following(self, parent_key: bytes, limit: int) -> list[tuple[int, ...]]:
        """Token ids of up to `limit` pages that follow a page, for explanations; none if that cannot be said."""
        return []

    @property
    def is_writing(self) -> bool:
        """Whether new pages are kept."""
        return True

    @property
    def has_room(self) -> bool:
        """Whether a page would be accepted now."""
        return self.is_writing

    def on_room(self, action: Callable[[], None]) -> None:
        """Have `action` called, by any thread, when there is room again."""
        del action

    def sources_of(self, keys: Seq[bytes]) -> dict[bytes, frozenset[str]]:
        """The sources of stored pages that have any."""
        del keys
        return {}

    def seen(self) -> list[bytes]:
        """Keys of pages that were used once and not stored, by this process or an earlier one."""
        return []

    def note_seen(self, keys: Seq[bytes]) -> None:
        """Remember a first use of pages that are not stored."""
        del keys

    def touch(self, keys: Seq[bytes]) -> None:
        """Count a use of stored pages."""
        del keys

    def tag(self, keys: Seq[bytes], sources: Seq[str]) -> None:
        """Note sources of stored pages."""
        del keys, sources

    def set_pinned(self, keys: Seq[bytes], *, pinned: bool) -> None:
        """Exempt pages from eviction as long as this process lives, or no longer."""
        del keys, pinned

    def flush(self) -> None:  # noqa: B027 (nothing to wait for by default)
        """Wait until everything put so far is kept."""

    def close(self, timeout_s: float) -> None:
        """Finish what was put, for `timeout_s` at most, and let go of everything. Idempotent."""
        del timeout_s

    def report(self) -> StoreReport | None:
        """The state of the store; None if it does not say."""
        return None

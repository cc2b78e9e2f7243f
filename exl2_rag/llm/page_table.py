"""Which page of the KV cache belongs to whom, and which tokens lie on it. Knows token ids and integers, no tensors.

Pages form a tree. A full page has a key: BLAKE2b of its parent's key and its token ids, so a key names the whole text
up to the page's end. A tree's root names what else keys and values depend on: model, cache, tenant, LoRA set. Below
each root and each full page hang its children: full pages, and pages being filled or left partly filled, which are
found by their first token. Trees of different roots share no page.

    root ── [the cat sat on] ── [the mat and slept] ── [all day]         three pages of 4 tokens, the last partly filled
                            └── [the roof . then ]

A sequence holds the pages from the root to its tail. Full pages are shared by counting holders. A page that agrees only
in its first rows is reused by copying those rows to a page of the sequence's own, so reuse is exact to the token.
Pages nobody holds stay in the tree until their place is needed: leaves only, least recently used first, which prunes
the least recently used chain from its tail. `page_table_check` recomputes all books from scratch.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from exl2_rag.errors import CacheIntegrityError
from exl2_rag.llm.evicted_pages import EvictedPages

KEY_BYTES = 16
# Evicted pages that are remembered, to tell why a prompt was not found: two for each page there is, within these.
MIN_REMEMBERED, MAX_REMEMBERED = 64, 16_384


@dataclass(slots=True)
class Page:
    """One page. Blank (no tokens), partly filled (no key), or full (with a key).

    Attributes:
        index: its place in the KV cache.
        parent_key: key of the page before it, or the root; meaningless while blank.
        root: the root of the tree it hangs in; meaningless while blank.
        key: set once all rows are filled.
        token_ids: the tokens whose keys and values its first rows hold.
        n_holders: how many `HeldPages` list it.
        n_children: how many pages with tokens follow it in the tree.
        last_used: the clock's value when it was last taken up or let go.
    """

    index: int
    parent_key: bytes = b""
    root: bytes = b""
    key: bytes | None = None
    token_ids: list[int] = field(default_factory=list)
    n_holders: int = 0
    n_children: int = 0
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy the first `n_rows` rows of page `source` to page `target` before anything is written to either."""

    source: int
    target: int
    n_rows: int


@dataclass(slots=True, eq=False)
class HeldPages:
    """The pages one sequence (or one pin) holds, from the root on.

    Attributes:
        root: what the first page hangs below.
        pages: page indices in order; the last ones may be blank.
        keys: keys of the full ones.
        n_tokens: tokens whose keys and values are on the pages.
        copy: rows to copy before the first forward pass, or None.
        pinned: held for later, not by a running sequence.
    """

    root: bytes
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    n_tokens: int = 0
    copy: PageCopy | None = None
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache holds of a prompt: full pages, then `n_rows` rows of the page `source`.

    Attributes:
        n_tokens: all matching tokens together.
        n_unheld: how many of the full pages nobody holds at present.
    """

    pages: tuple[int, ...]
    keys: tuple[bytes, ...]
    source: int | None
    n_rows: int
    n_tokens: int
    n_unheld: int


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages by state. Each page is in exactly one of free, cached, running and pinned."""

    free: int
    cached: int
    running: int
    pinned: int


class PageTable:
    """Pages of `page_size` tokens, shared between sequences that begin with the same tokens.

    Args:
        n_pages: pages in the KV cache.
        page_size: tokens on a page.
        root_key: root of sequences that name none. Roots are longer than page keys, so neither passes for the other.
    """

    def __init__(self, n_pages: int, page_size: int, root_key: bytes = b"\0" * 32) -> None:
        if n_pages < 1 or page_size < 1:
            raise ValueError(f"expected at least one page of one token, got {n_pages} pages of {page_size}")
        self.page_size = page_size
        self.root_key = root_key
        self.pages = [Page(index) for index in range(n_pages)]
        self.n_evicted = 0
        self.on_evict: Callable[[Page], None] | None = None  # told of a page while its rows are still in place
        self.evicted = EvictedPages(min(max(2 * n_pages, MIN_REMEMBERED), MAX_REMEMBERED))
        self.roots: dict[bytes, int] = {}  # pages with tokens below each, in the order in which they came up
        self._free = list(range(n_pages - 1, -1, -1))
        self._by_key: dict[bytes, int] = {}
        self._children: dict[bytes, dict[int, list[int]]] = {}  # by the key they follow, then by their first token
        self._holds: dict[int, HeldPages] = {}
        self._evictable: list[tuple[int, int]] = []  # heap of (last_used, index); stale entries are skipped when met
        self._n_cached = 0
        self._clock = 0

    @property
    def n_pages(self) -> int:
        """Pages in all."""
        return len(self.pages)

    @property
    def n_available(self) -> int:
        """Pages that could be taken now: free ones, and cached ones that nobody holds."""
        return len(self._free) + self._n_cached

    def pages_for(self, n_tokens: int) -> int:
        """How many pages `n_tokens` tokens take."""
        return -(-n_tokens // self.page_size)

    def page_key(self, parent_key: bytes, token_ids: Seq[int]) -> bytes:
        """The key of a full page with these tokens after the page with `parent_key`."""
        return hashlib.blake2b(parent_key + array("q", token_ids).tobytes(), digest_size=KEY_BYTES).digest()

    def lookup(
        self, token_ids: Seq[int], limit: int, known_keys: list[bytes] | None = None, root: bytes | None = None
    ) -> PrefixMatch:
        """What is cached of the first `limit` tokens. Changes nothing.

        Args:
            known_keys: page keys of these tokens from earlier calls; new ones are appended, so that a request that
                waits long is hashed once.
            root: the tree to look in; None is the table's own.
        """
        known_keys = [] if known_keys is None else known_keys
        pages: list[int] = []
        keys: list[bytes] = []
        parent_key = self.root_key if root is None else root
        for end in range(self.page_size, limit + 1, self.page_size):
            wanted = list(token_ids[end - self.page_size : end])
            if len(known_keys) == len(pages):
                known_keys.append(self.page_key(parent_key, wanted))
            key = known_keys[len(pages)]
            index = self._by_key.get(key)
            if index is None or self.pages[index].token_ids != wanted:
                break
            pages.append(index)
            keys.append(key)
            parent_key = key
        start = len(pages) * self.page_size
        source, n_rows = self._best_sibling(parent_key, token_ids[start : min(limit, start + self.page_size)])
        n_unheld = sum(self.pages[index].n_holders == 0 for index in pages)
        return PrefixMatch(tuple(pages), tuple(keys), source, n_rows, start + n_rows, n_unheld)

    def has_page(self, key: bytes, token_ids: list[int]) -> bool:
        """Whether there is a full page of this key that holds these tokens."""
        index = self._by_key.get(key)
        return index is not None and self.pages[index].token_ids == token_ids

    def matching_rows(self, parent_key: bytes, token_ids: Seq[int]) -> int:
        """How many of these tokens the best page after `parent_key` begins with."""
        return self._best_sibling(parent_key, token_ids)[1]

    def hold(
        self, token_ids: Seq[int], limit: int, known_keys: list[bytes] | None = None, root: bytes | None = None
    ) -> HeldPages:
        """Take up what is cached of the first `limit` tokens below `root`. Arguments as for `lookup`.

        The caller carries out `copy`, if there is one, before the next forward pass, in the order of the calls.
        Partly matching rows are left out when no page is left to copy them to.
        """
        match = self.lookup(token_ids, limit, known_keys, root)
        self._clock += 1
        held = HeldPages(
            root=self.root_key if root is None else root,
            pages=list(match.pages),
            keys=list(match.keys),
            n_tokens=len(match.pages) * self.page_size,
        )
        for index in match.pages:
            self._add_holder(self.pages[index])
        self._holds[id(held)] = held
        if match.source is not None:
            held.copy = self._hold_rows(held, self.pages[match.source], match.n_rows)
        return held

    def fork(self, held: HeldPages) -> HeldPages:
        """Pages for a sequence that goes on from where another one is: full ones shared, the last one copied.

        The caller carries out `copy`, if there is one, before anything else is written. Where no page is left to copy
        to, the rows of the last page are left out.
        """
        n_full = len(held.keys)
        branch = HeldPages(
            root=held.root, pages=held.pages[:n_full], keys=list(held.keys), n_tokens=n_full * self.page_size
        )
        self._clock += 1
        for index in branch.pages:
            self._add_holder(self.pages[index])
        self._holds[id(branch)] = branch
        if held.n_tokens > branch.n_tokens:
            source = self.pages[held.pages[n_full]]
            target = self._take()
            if target is not None:
                target.n_holders = 1
                self._enter(target, source.parent_key, source.token_ids, held.root)
                branch.copy = PageCopy(source.index, target.index, len(source.token_ids))
                branch.pages.append(target.index)
                branch.n_tokens += len(source.token_ids)
        return branch

    def extend(self, held: HeldPages, n_tokens: int) -> int:
        """Take pages until `n_tokens` tokens fit, or none is left; return how many tokens fit (at most `n_tokens`)."""
        while len(held.pages) * self.page_size < n_tokens:
            page = self._take()
            if page is None:
                break
            page.n_holders = 1
            held.pages.append(page.index)
        return min(n_tokens, len(held.pages) * self.page_size)

    def commit(self, held: HeldPages, token_ids: Seq[int]) -> None:
        """Say that the keys and values of the next `token_ids` now lie on the pages, which makes them shareable.

        A page that turns out equal to one the tree already has is swapped for it, and its own place freed.
        """
        done = 0
        while done < len(token_ids):
            place, row = divmod(held.n_tokens, self.page_size)
            page = self.pages[held.pages[place]]
            rows = token_ids[done : done + self.page_size - row]
            if row == 0:
                self._enter(page, held.keys[-1] if held.keys else held.root, rows, held.root)
            else:
                page.token_ids.extend(rows)
            done += len(rows)
            held.n_tokens += len(rows)
            if len(page.token_ids) == self.page_size:
                self._complete(held, place, page)

    def release(self, held: HeldPages) -> None:
        """Let go of the pages. Those with tokens stay cached until their place is needed."""
        del self._holds[id(held)]
        self._let_go(held, 0)
        held.keys, held.n_tokens, held.pinned = [], 0, False

    def truncate(self, held: HeldPages, n_tokens: int) -> PageCopy | None:
        """Give up all tokens after the first `n_tokens`, and the pages that then hold none.

        Full pages stay in the tree for whoever needs them; rows that are still wanted of one are copied. The page that
        was being filled is cut. Rows that were written beyond `held.n_tokens` but never committed need nothing.

        Returns:
            Rows to copy before the next forward pass, in the order of the calls, or None. `held.n_tokens` is less than
            `n_tokens` if no page was left to copy them to; then they must be computed again.
        """
        if not 0 <= n_tokens <= held.n_tokens:
            raise ValueError(f"expected a number of tokens from 0 to {held.n_tokens} to keep, got {n_tokens}")
        n_full, n_rows = divmod(n_tokens, self.page_size)
        last = self.pages[held.pages[n_full]] if n_rows else None
        if last is not None and last.key is None:
            del last.token_ids[n_rows:]
            self._let_go(held, n_full + 1)
            held.n_tokens = n_tokens
            return None
        self._let_go(held, n_full)
        del held.keys[n_full:]
        held.n_tokens = n_full * self.page_size
        return None if last is None else self._hold_rows(held, last, n_rows)

    def find(self, key: bytes) -> int | None:
        """The index of the full page with this key."""
        return self._by_key.get(key)

    def discard(self, keys: Iterable[bytes]) -> int:
        """Make the pages of these keys, and those that follow them, blank, as far as nobody holds them; how many."""
        children: dict[bytes, list[Page]] = {}
        for page in self.pages:
            if page.token_ids:
                children.setdefault(page.parent_key, []).append(page)
        doomed: dict[int, Page] = {}
        front = [self.pages[self._by_key[key]] for key in keys if key in self._by_key]
        while front:
            page = front.pop()
            doomed.pop(page.index, None)
            doomed[page.index] = page  # after every page that it follows
            front += children.get(page.key, []) if page.key is not None else []
        n_pages = 0
        for page in reversed(doomed.values()):
            if self._is_evictable(page):
                self._n_cached -= 1
                self._forget(page)
                self._free.append(page.index)
                n_pages += 1
        return n_pages

    def drop(self, token_ids: Seq[int] | None = None, root: bytes | None = None) -> int:
        """Forget cached pages below `root` that nobody holds; return how many. None of the held ones is touched.

        Args:
            token_ids: the text to forget, with all that goes on from it. Leading pages that another text goes on from
                stay. None forgets every text.
        """
        root = self.root_key if root is None else root
        if token_ids is None:
            wanted = {page.index for page in self.pages if page.root == root}
        else:
            wanted = self._pages_of(token_ids, root)
        ready = [self.pages[index] for index in wanted if self._is_evictable(self.pages[index])]
        n_dropped = 0
        while ready:
            page = ready.pop()
            parent_index = self._by_key.get(page.parent_key)
            self._evict(page)
            self._free.append(page.index)
            n_dropped += 1
            if parent_index in wanted and self._is_evictable(self.pages[parent_index]):
                ready.append(self.pages[parent_index])
        return n_dropped

    def text_after(self, parent_key: bytes, source: int | None, n_rows: int, n_tokens: int) -> tuple[int, ...]:
        """Up to `n_tokens` tokens of a cached text: from row `n_rows` of the page `source` on; without a source, what
        was hung below `parent_key` last."""
        found: list[int] = []
        page = self._youngest_child(parent_key) if source is None else self.pages[source]
        while page is not None and len(found) < n_tokens:
            found += page.token_ids[n_rows : n_rows + n_tokens - len(found)]
            n_rows = 0
            page = None if page.key is None else self._youngest_child(page.key)
        return tuple(found)

    def counts(self) -> PageCounts:
        """Pages by state."""
        pinned = {index for held in self._holds.values() if held.pinned for index in held.pages}
        held_pages = {index for held in self._holds.values() for index in held.pages}
        return PageCounts(len(self._free), self._n_cached, len(held_pages - pinned), len(pinned))

    def _youngest_child(self, key: bytes) -> Page | None:
        by_first_token = self._children.get(key)
        return self.pages[by_first_token[next(reversed(by_first_token))][-1]] if by_first_token else None

    def _pages_of(self, token_ids: Seq[int], root: bytes) -> set[int]:
        """The pages of a text and of every text that goes on from it."""
        match = self.lookup(token_ids, len(token_ids), root=root)
        rest = list(token_ids[len(match.pages) * self.page_size :])
        found = list(match.pages)
        place = len(found)
        for siblings in self._children.get(match.keys[-1] if match.keys else root, {}).values():
            for index in siblings:
                tokens = self.pages[index].token_ids
                # One page of the text itself, left partly filled, or one that goes on from its last token.
                if common_prefix(tokens, rest) == min(len(tokens), len(rest)):
                    found.append(index)
        while place < len(found):
            key = self.pages[found[place]].key
            place += 1
            if key is not None:
                found += [index for siblings in self._children.get(key, {}).values() for index in siblings]
        return set(found)

    def _best_sibling(self, parent_key: bytes, wanted: Seq[int]) -> tuple[int | None, int]:
        """The page after `parent_key` that agrees with `wanted` longest, and in how many rows.

        Among equals one that can be taken over as it is comes first, since that spares the copy.
        """
        best: int | None = None
        n_best = 0
        spares_copy = False
        for index in self._children.get(parent_key, {}).get(wanted[0], ()) if wanted else ():
            page = self.pages[index]
            n_tokens = len(page.token_ids)
            # Most pages differ from the prompt where the best one so far does not; they need no comparison. Prompts
            # that all begin with BOS make this list long.
            if (
                n_best
                and n_tokens != n_best
                and (n_best == len(wanted) or n_tokens < n_best or page.token_ids[n_best] != wanted[n_best])
            ):
                continue
            n_rows = common_prefix(page.token_ids, wanted)
            can_continue = page.n_holders == 0 and n_tokens == n_rows
            if (n_rows, can_continue) > (n_best, spares_copy):
                best, n_best, spares_copy = index, n_rows, can_continue
        return best, n_best

    def _let_go(self, held: HeldPages, n_kept: int) -> None:
        """Take the pages after the first `n_kept` from their holder."""
        self._clock += 1
        for index in held.pages[n_kept:]:
            page = self.pages[index]
            page.n_holders -= 1
            if page.n_holders:
                continue
            if page.token_ids:
                self._n_cached += 1
                self._touch(page)
            else:
                self._free.append(index)
        del held.pages[n_kept:]

    def _hold_rows(self, held: HeldPages, source: Page, n_rows: int) -> PageCopy | None:
        """Add a page with the first `n_rows` rows of `source`, if one can be had; return the rows to copy, if any."""
        copy: PageCopy | None = None
        continues = source.n_holders == 0 and source.key is None and len(source.token_ids) == n_rows
        target = None if continues else self._take(avoid=source)
        if target is not None:
            target.n_holders = 1
            self._enter(target, source.parent_key, source.token_ids[:n_rows], held.root)
            copy = PageCopy(source.index, target.index, n_rows)
            if source.n_holders == 0:
                self._touch(source)
        elif continues or (source.n_holders == 0 and source.n_children == 0):
            # Taken over where it lies: either nothing of it is lost, or it is the only page left and would be evicted.
            self._drop_key(source)
            del source.token_ids[n_rows:]
            self._add_holder(source)
            target = source
        else:
            return None
        held.pages.append(target.index)
        held.n_tokens += n_rows
        return copy

    def _take(self, avoid: Page | None = None) -> Page | None:
        """A blank page, evicting a cached one if need be; None when all others are held (or it is `avoid`)."""
        if self._free:
            return self.pages[self._free.pop()]
        avoided: tuple[int, int] | None = None
        taken: Page | None = None
        while self._evictable and taken is None:
            entry = heapq.heappop(self._evictable)
            page = self.pages[entry[1]]
            if not self._is_evictable(page) or page.last_used != entry[0]:
                continue
            if page is avoid:
                avoided = entry
                continue
            self.n_evicted += 1
            if self.on_evict is not None:
                self.on_evict(page)
            self._evict(page)
            taken = page
        if avoided is not None:
            heapq.heappush(self._evictable, avoided)
        return taken

    def _evict(self, page: Page) -> None:
        """Make a cached page without children blank, and remember that it was there."""
        self._n_cached -= 1
        self.evicted.add(page.parent_key, page.token_ids, page.key)
        self._forget(page)

    def _is_evictable(self, page: Page) -> bool:
        return page.n_holders == 0 and page.n_children == 0 and bool(page.token_ids)

    def _add_holder(self, page: Page) -> None:
        if page.n_holders == 0:
            self._n_cached -= 1
        page.n_holders += 1
        page.last_used = self._clock

    def _touch(self, page: Page) -> None:
        """Mark a page that nobody holds as used just now."""
        page.last_used = self._clock
        self._offer(page)

    def _offer(self, page: Page) -> None:
        """Put a page among those to evict, if it may be evicted."""
        if not self._is_evictable(page):
            return
        heapq.heappush(self._evictable, (page.last_used, page.index))
        if len(self._evictable) > 4 * len(self.pages) + 64:
            self._evictable = [(page.last_used, page.index) for page in self.pages if self._is_evictable(page)]
            heapq.heapify(self._evictable)

    def _enter(self, page: Page, parent_key: bytes, token_ids: Seq[int], root: bytes) -> None:
        """Hang a blank page that has just got its first tokens into the tree of `root`."""
        page.parent_key = parent_key
        page.root = root
        self.roots[root] = self.roots.get(root, 0) + 1
        page.token_ids = list(token_ids)
        self._children.setdefault(parent_key, {}).setdefault(page.token_ids[0], []).append(page.index)
        if parent_key != root:
            self.pages[self._by_key[parent_key]].n_children += 1

    def _complete(self, held: HeldPages, place: int, page: Page) -> None:
        """Give a page whose last row was just filled its key, or swap it for an equal one."""
        key = self.page_key(page.parent_key, page.token_ids)
        held.keys.append(key)
        twin_index = self._by_key.get(key)
        if twin_index is None:
            page.key = key
            self._by_key[key] = page.index
            return
        twin = self.pages[twin_index]
        if twin.token_ids != page.token_ids:
            raise CacheIntegrityError(f"pages {twin.index} and {page.index} have one key but different tokens")
        self._clock += 1
        self._add_holder(twin)
        held.pages[place] = twin.index
        page.n_holders = 0
        self._forget(page)
        self._free.append(page.index)

    def _forget(self, page: Page) -> None:
        """Take a page out of the tree and make it blank."""
        by_first_token = self._children[page.parent_key]
        siblings = by_first_token[page.token_ids[0]]
        siblings.remove(page.index)
        if not siblings:
            del by_first_token[page.token_ids[0]]
            if not by_first_token:
                del self._children[page.parent_key]
        self._drop_key(page)
        if page.parent_key != page.root:
            parent = self.pages[self._by_key[page.parent_key]]
            parent.n_children -= 1
            self._offer(parent)
        self.roots[page.root] -= 1
        if not self.roots[page.root]:
            del self.roots[page.root]
        page.parent_key = page.root = b""
        page.token_ids = []

    def _drop_key(self, page: Page) -> None:
        if page.key is not None:
            del self._by_key[page.key]
            page.key = None


def common_prefix(left: Seq[int], right: Seq[int]) -> int:
    """How many leading tokens agree."""
    shorter = min(len(left), len(right))
    step = 64  # whole runs are compared at C speed, the last one token by token
    start = 0
    while start < shorter and list(left[start : start + step]) == list(right[start : start + step]):
        start = min(start + step, shorter)
        if start == shorter:
            return shorter
    for place in range(start, min(start + step, shorter)):
        if left[place] != right[place]:
            return place
    return min(start + step, shorter)

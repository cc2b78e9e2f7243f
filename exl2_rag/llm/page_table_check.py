"""Recomputes a page table from scratch and says where it disagrees with itself. For tests and for finding bugs.

Reads the private books of `PageTable` on purpose: what it checks is that they agree with what the pages themselves say.
"""

from __future__ import annotations

from collections import Counter

from exl2_rag.errors import CacheIntegrityError
from exl2_rag.llm.page_table import HeldPages, Page, PageTable


def check_integrity(table: PageTable) -> None:
    """Recompute everything from scratch and compare.

    Raises:
        CacheIntegrityError: the table contradicts itself; the message lists every fault found.
    """
    faults = find_faults(table)
    if faults:
        raise CacheIntegrityError("expected a consistent page table, found: " + "; ".join(faults))


def find_faults(table: PageTable) -> list[str]:
    """Every contradiction found, in words; empty for a sound table."""
    return [
        *_state_faults(table),
        *_tree_faults(table),
        *_index_faults(table),
        *_hold_faults(table),
        *_eviction_faults(table),
    ]


def _state_faults(table: PageTable) -> list[str]:
    """Each page is free, cached or held, and its holders are counted right."""
    faults = []
    holders: Counter[int] = Counter()
    for held in table._holds.values():
        holders.update(held.pages)
        if len(set(held.pages)) != len(held.pages):
            faults.append(f"one sequence lists a page twice: {held.pages}")
    free = Counter(table._free)
    n_cached = 0
    for page in table.pages:
        name = f"page {page.index}"
        if page.n_holders != holders[page.index]:
            faults.append(f"{name} counts {page.n_holders} holders, {holders[page.index]} list it")
        if free[page.index] > 1:
            faults.append(f"{name} is {free[page.index]} times in the free list")
        if free[page.index] and (holders[page.index] or page.token_ids):
            faults.append(f"{name} is free and in use")
        if not free[page.index] and not holders[page.index]:
            if page.token_ids:
                n_cached += 1
            else:
                faults.append(f"{name} is blank and nobody holds it, but it is not in the free list")
    if n_cached != table._n_cached:
        faults.append(f"{table._n_cached} cached pages are counted, there are {n_cached}")
    return faults


def _tree_faults(table: PageTable) -> list[str]:
    """Keys, parents and child counts follow from the tokens on the pages."""
    faults = []
    by_own_key = {page.key: page for page in table.pages if page.key is not None}
    children: Counter[bytes] = Counter(page.parent_key for page in table.pages if page.token_ids)
    for page in table.pages:
        name = f"page {page.index}"
        if len(page.token_ids) > table.page_size:
            faults.append(f"{name} has {len(page.token_ids)} tokens, more than {table.page_size}")
        is_full = len(page.token_ids) == table.page_size
        if is_full and page.key is None:
            faults.append(f"{name} is full but has no key")
        if page.key is not None and not is_full:
            faults.append(f"{name} has a key but is not full")
        if page.key is not None and page.key != table.page_key(page.parent_key, page.token_ids):
            faults.append(f"{name} has a key that does not follow from its tokens")
        parent = by_own_key.get(page.parent_key)
        if page.token_ids and page.parent_key != page.root and parent is None:
            faults.append(f"{name} has lost its parent")
        if parent is not None and parent.root != page.root:
            faults.append(f"{name} hangs below a page of another root")
        expected = children[page.key] if page.key is not None else 0
        if page.n_children != expected:
            faults.append(f"{name} counts {page.n_children} children, there are {expected}")
    return faults


def _index_faults(table: PageTable) -> list[str]:
    """The look-up tables list each page once, in the right place."""
    faults = []
    keyed = {page.key: page.index for page in table.pages if page.key is not None}
    if keyed != table._by_key:
        faults.append("the table of keys does not list the pages' keys")
    if len(keyed) != sum(page.key is not None for page in table.pages):
        faults.append("two pages have the same key")
    expected = Counter((page.parent_key, page.token_ids[0], page.index) for page in table.pages if page.token_ids)
    listed = Counter(
        (key, first_token, index)
        for key, by_first_token in table._children.items()
        for first_token, indices in by_first_token.items()
        for index in indices
    )
    if expected != listed:
        faults.append("the table of children does not list the pages with tokens")
    if not all(by_first_token and all(by_first_token.values()) for by_first_token in table._children.values()):
        faults.append("the table of children keeps an empty list")
    if table.roots != Counter(page.root for page in table.pages if page.token_ids):
        faults.append("the pages of each root are counted wrong")
    return faults


def _hold_faults(table: PageTable) -> list[str]:
    """What a sequence holds is one chain from the root, filled without gaps, and only shared where it is full."""
    faults = []
    for held in table._holds.values():
        if len(held.pages) < table.pages_for(held.n_tokens):
            faults.append(f"a sequence holds {len(held.pages)} pages for {held.n_tokens} tokens")
            continue
        parent_key = held.root
        for place, index in enumerate(held.pages):
            page = table.pages[index]
            n_rows = min(max(held.n_tokens - place * table.page_size, 0), table.page_size)
            faults += _held_page_faults(page, held, n_rows, parent_key)
            if n_rows == table.page_size:
                parent_key = table.page_key(parent_key, page.token_ids)
                if held.keys[place : place + 1] != [parent_key]:
                    faults.append(f"a sequence has a wrong key for page {index}")
        if len(held.keys) != held.n_tokens // table.page_size:
            faults.append(f"a sequence has {len(held.keys)} keys for {held.n_tokens} tokens")
    return faults


def _held_page_faults(page: Page, held: HeldPages, n_rows: int, parent_key: bytes) -> list[str]:
    faults = []
    if len(page.token_ids) != n_rows:
        faults.append(
            f"page {page.index} has {len(page.token_ids)} tokens, its sequence of {held.n_tokens} says {n_rows}"
        )
    if n_rows and page.parent_key != parent_key:
        faults.append(f"page {page.index} hangs below another page than its sequence says")
    if n_rows and page.root != held.root:
        faults.append(f"page {page.index} hangs below another root than its sequence says")
    if page.key is None and page.n_holders > 1:
        faults.append(f"page {page.index} is shared while it is being filled")
    return faults


def _eviction_faults(table: PageTable) -> list[str]:
    """Whatever may be evicted can be found, and a chain's head is never older than its tail."""
    faults = []
    offered = set(table._evictable)
    keyed = {page.key: page for page in table.pages if page.key is not None}
    for page in table.pages:
        if page.n_holders or not page.token_ids:
            continue
        if page.n_children == 0 and (page.last_used, page.index) not in offered:
            faults.append(f"page {page.index} could be evicted but would never be found")
        parent = keyed.get(page.parent_key)
        if parent is not None and parent.n_holders == 0 and parent.last_used < page.last_used:
            faults.append(f"page {parent.index} looks older than page {page.index}, which follows it")
    return faults

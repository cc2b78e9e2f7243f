"""Random operations on a page table, each followed by a full check: what is cached, who holds it, which rows hold what.

Sequences of several roots begin with shared texts, grow, give up tokens, are pinned, end, and have their texts dropped.
What the table finds is compared with a search of all pages that knows no keys; `check_integrity` recomputes its books.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from exl2_rag.llm.cached_order import cached_order
from exl2_rag.llm.page_table import HeldPages, PageTable
from exl2_rag.llm.prefix_trace import trace_prefix
from tests.support.page_memory import PageMemory

ROOTS = (None, b"one tenant".ljust(32), b"another tenant".ljust(32))


@dataclass
class Running:
    """A sequence: its pages, its tokens, its root."""

    held: HeldPages
    tokens: list[int]
    root: bytes | None


class PageTableOperations:
    """Draws operations and carries them out.

    Args:
        longest: tokens of the longest text.
        most: sequences at a time.
    """

    def __init__(self, seed: int, *, n_pages: int, page_size: int, longest: int, most: int) -> None:
        self.random = random.Random(seed)
        self.memory = PageMemory(PageTable(n_pages, page_size))
        self.texts = [[self.random.choice((1, 2)) for _ in range(longest)] for _ in range(6)]
        self.running: list[Running] = []
        self.counts: Counter[str] = Counter()
        self._longest = longest
        self._most = most
        self._weights = {
            self.start: 30, self.grow: 40, self.end: 22, self.pin: 4, self.truncate: 8, self.drop: 2, self.look: 6,
        }  # fmt: skip

    def run(self, n_operations: int) -> None:
        """Carry out operations, checking everything after each."""
        actions, weights = list(self._weights), list(self._weights.values())
        for _ in range(n_operations):
            self.random.choices(actions, weights)[0]()
            self.memory.check()
            for one in self.running:
                self.memory.check_content(one.held, one.tokens)

    def finish(self) -> None:
        """End everything; then every page must be free or cached, and after a last drop free."""
        table = self.memory.table
        for one in self.running:
            self.memory.release(one.held)
        self.memory.check()
        assert table.n_available == table.n_pages
        for root in ROOTS:
            table.drop(root=root)
        self.memory.check()
        assert table.counts().free == table.n_pages
        assert not table.roots

    def start(self) -> None:
        """Begin a sequence; what it finds must be the most that any page has for it."""
        if len(self.running) >= self._most:
            return
        prompt, root = self._text(), self.random.choice(ROOTS)
        limit = len(prompt) - 1
        expected = self.memory.longest_cached(prompt, limit, root)
        assert self.memory.table.lookup(prompt, limit, root=root).n_tokens == expected
        trace = trace_prefix(self.memory.table, prompt, limit, root=root, other_roots=list(self.memory.table.roots))
        assert trace.n_reused == expected
        self.counts[f"trace: {trace.reason}"] += 1
        held = self.memory.hold(prompt, limit=limit, root=root)
        full = expected // self.memory.table.page_size * self.memory.table.page_size
        assert held.n_tokens in (full, expected)  # rows are left out only where no page is free to copy them to
        self.running.append(Running(held, prompt, root))
        self.counts["reused" if held.n_tokens else "started"] += 1

    def grow(self) -> None:
        """Compute what is missing, and perhaps some more."""
        one = self._pick()
        if one is None or one.held.pinned:
            return
        more = self.random.randrange(10)
        one.tokens += [self.random.choice((1, 2)) for _ in range(min(more, self._longest - len(one.tokens)))]
        self.memory.compute(one.held, one.tokens)
        self.counts["grown"] += 1

    def truncate(self) -> None:
        """Give up the last tokens."""
        one = self._pick()
        if one is None or one.held.pinned or not one.held.n_tokens:
            return
        n_kept = self.random.randrange(one.held.n_tokens + 1)
        del one.tokens[max(n_kept, 1) :]
        self.memory.truncate(one.held, min(n_kept, len(one.tokens)))
        self.counts["truncated"] += 1

    def pin(self) -> None:
        """Mark the pages of a sequence as pinned, or no longer."""
        one = self._pick()
        if one is not None:
            one.held.pinned = not one.held.pinned
            self.counts["pinned"] += one.held.pinned

    def end(self) -> None:
        """Let go of the pages of a sequence."""
        one = self._pick()
        if one is not None:
            self.running.remove(one)
            self.memory.release(one.held)
            self.counts["ended"] += 1

    def drop(self) -> None:
        """Forget a text, or all of a root; what is held must stay."""
        root = self.random.choice(ROOTS)
        text = None if self.random.random() < 0.2 else self._text()
        before = self.memory.table.counts()
        n_dropped = self.memory.table.drop(text, root)
        after = self.memory.table.counts()
        assert (after.running, after.pinned) == (before.running, before.pinned)
        assert after.free == before.free + n_dropped
        self.counts["dropped"] += n_dropped
        if text is not None and not any(one.root == root for one in self.running):
            assert self.memory.longest_cached(text, len(text), root) < len(text)

    def look(self) -> None:
        """Ask for an order of blocks; it must be a permutation."""
        text = self._text()
        cuts = sorted(self.random.sample(range(len(text) + 1), min(4, len(text))))
        blocks = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        order = cached_order(self.memory.table, [], blocks, root=self.random.choice(ROOTS))
        assert sorted(order) == list(range(len(blocks)))

    def _pick(self) -> Running | None:
        return self.random.choice(self.running) if self.running else None

    def _text(self) -> list[int]:
        head = self.random.choice(self.texts)[: self.random.randrange(1, self._longest)]
        tail = [self.random.choice((1, 2)) for _ in range(self.random.randrange(5))]
        return (head + tail)[: self._longest]

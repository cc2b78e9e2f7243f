"""Which prompts' pages are kept, until when, and how much of the cache they may keep together. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from exl2_rag.errors import PinLimitError
from exl2_rag.llm.page_table import PageTable
from exl2_rag.llm.sequence import Sequence

MAX_PINNED_SHARE = 0.75
"""Of all pages. The rest is for requests: a cache that is pinned full could serve nobody."""


@dataclass(frozen=True, slots=True)
class PinReport:
    """One pin. `expires_in_s` is None for a pin that is kept until it is released; pins may share pages."""

    tokens: int
    pages: int
    expires_in_s: float | None


class PinBook:
    """The pins of one page table.

    Args:
        clock: seconds, never running backwards.
    """

    def __init__(self, table: PageTable, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.on_release: Callable[[Sequence], None] | None = None  # told of a pin whose pages are about to be let go
        self._table = table
        self._until: dict[Sequence, float | None] = {}

    def __len__(self) -> int:
        return len(self._until)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._until))

    def check(self, sequence: Sequence, promised: Iterable[Sequence]) -> None:
        """See to it that the pages of a prompt may be kept beside the pins there are.

        Args:
            promised: sequences that are being computed to be pinned.

        Raises:
            PinLimitError: all pins together would hold more than `MAX_PINNED_SHARE` of the cache.
        """
        self.expire()
        table = self._table
        pinned = {index for one in self._until if one.held is not None for index in one.held.pages}
        coming = sum(table.pages_for(one.n_prompt) for one in promised if one is not sequence)
        match = table.lookup(sequence.token_ids, len(sequence.token_ids), sequence.page_keys, sequence.cache_root)
        own = table.pages_for(sequence.n_prompt) - sum(index in pinned for index in match.pages)
        limit = int(table.n_pages * MAX_PINNED_SHARE)
        if len(pinned) + coming + own > limit:
            raise PinLimitError(
                f"pinning {sequence.n_prompt} tokens takes {own} more pages of {table.page_size} tokens; "
                f"{len(pinned) + coming} of {table.n_pages} are pinned already and at most {limit} may be, so that "
                "requests find room; release a pin, give pins a time to live (ttl_s), or give a larger cache_tokens"
            )

    def add(self, sequence: Sequence, ttl_s: float | None) -> None:
        """Keep the pages of a computed prompt; the time to live begins now."""
        assert sequence.held is not None
        self._until[sequence] = None if ttl_s is None else self.clock() + ttl_s
        sequence.held.pinned = True

    def renew(self, sequence: Sequence, ttl_s: float | None) -> bool:
        """Begin another time to live; False if the pin is gone."""
        self.expire()
        if sequence not in self._until:
            return False
        self._until[sequence] = None if ttl_s is None else self.clock() + ttl_s
        return True

    def release(self, sequence: Sequence) -> None:
        """Let go of the pages, which stay cached. Harmless when that has happened already."""
        if sequence in self._until:
            del self._until[sequence]
            assert sequence.held is not None
            if self.on_release is not None:
                self.on_release(sequence)
            self._table.release(sequence.held)
            sequence.held = None

    def expire(self) -> None:
        """Release the pins whose time is over."""
        if not self._until:
            return
        now = self.clock()
        for sequence in [one for one, until in self._until.items() if until is not None and until <= now]:
            self.release(sequence)

    def is_active(self, sequence: Sequence) -> bool:
        """Whether the pages are kept at this moment. Changes nothing; safe from any thread."""
        until = self._until.get(sequence, 0.0)
        return sequence in self._until and (until is None or self.clock() < until)

    def reports(self) -> tuple[PinReport, ...]:
        """Every pin, the oldest first."""
        self.expire()
        now = self.clock()
        return tuple(
            PinReport(one.n_prompt, len(one.held.pages), None if until is None else until - now)
            for one, until in self._until.items()
            if one.held is not None
        )

    def forget_all(self) -> None:
        """End every pin without touching the page table, which is not to be used any more."""
        for sequence in self._until:
            sequence.held = None
        self._until.clear()

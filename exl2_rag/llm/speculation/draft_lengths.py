"""How many draft tokens pay. Knows probabilities and seconds, no tokens and no tensors.

A step of r rows takes cost(r) seconds; that function has a form of its own on every machine (rows that share the
reading of the weights are cheap, rows that overload the arithmetic are not), so it is measured as steps are run. A
draft token is a row more; it yields a token with the probability that it and all before it are right.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

OPTIMISM = 0.05
"""What a row more is taken to cost, as a share of a step, until it was tried."""
SAMPLES = 7
"""Steps of one size whose median is taken."""
LEAST_GAIN = 1.03
"""Drafting less profitable than this is left, for estimates are not that exact."""


class StepCosts:
    """Seconds that a decode step takes, by its rows."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._known: dict[int, float] = {}
        self._noted: set[int] = set()  # sizes with samples that `_known` does not know of yet

    def note(self, n_rows: int, seconds: float) -> None:
        """A step of `n_rows` rows took so long. The first one of its size, which has more to do, does not count."""
        samples = self._samples.get(n_rows)
        if samples is None:
            self._samples[n_rows] = deque(maxlen=SAMPLES)
            return
        samples.append(seconds)
        self._noted.add(n_rows)

    def known(self) -> dict[int, float]:
        """Seconds by rows, of the sizes that were tried."""
        for n_rows in self._noted:
            self._known[n_rows] = statistics.median(self._samples[n_rows])
        self._noted.clear()
        return self._known

    def seconds(self, n_rows: int) -> float:
        """What a step of `n_rows` will take; a size that was never tried is taken to be cheap, so that it is tried.

        Returns:
            Seconds; 1 if nothing at all is known.
        """
        known = self.known()
        if n_rows in known:
            return known[n_rows]
        below = max((rows for rows in known if rows < n_rows), default=0)
        above = min((rows for rows in known if rows > n_rows), default=0)
        if not below:
            return known[above] if above else 1.0
        guess = known[below] * (1 + OPTIMISM * (n_rows - below))
        return min(guess, known[above]) if above else guess

    def knows_below(self, n_rows: int) -> bool:
        """Whether a step of that size or a smaller one was measured; without that nothing can be said to pay."""
        return any(rows <= n_rows for rows in self.known())


def choose_lengths(
    chances: Seq[Seq[float]], n_rows: int, seconds: Callable[[int], float], extra: Callable[[int], float] | None = None
) -> list[int]:
    """How many draft tokens each sequence should get, so that the most tokens come out of a second.

    Args:
        chances: for each sequence, how likely its first draft token is right, its first two are, and so on: falling.
        n_rows: rows that the step has without drafts, at least one for each sequence.
        seconds: what a step of so many rows takes.
        extra: seconds that it takes to make drafts of so many tokens at the longest; None: none.

    Returns:
        The length for each sequence; all 0 if drafting does not pay.
    """
    # The likeliest tokens first; within a sequence that is their order, for chances fall.
    order = sorted(
        (-chance, place, index) for index, falling in enumerate(chances) for place, chance in enumerate(falling)
    )
    lengths = best = [0] * len(chances)
    n_tokens = float(len(chances))
    best_rate = n_tokens / seconds(n_rows) * LEAST_GAIN
    for count, (chance, place, index) in enumerate(order, start=1):
        lengths = lengths.copy()
        lengths[index] = place + 1
        n_tokens -= chance
        cost = seconds(n_rows + count) + (extra(max(lengths)) if extra is not None else 0.0)
        if n_tokens / cost > best_rate:
            best, best_rate = lengths, n_tokens / cost
    return best

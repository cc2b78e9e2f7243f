"""What steps have taken, and how much prefill a step can take on without making those who decode wait. Numbers only.

While some sequences decode, a step that also computes a slice of a prompt is a longer gap between their tokens. The
promise: no such step takes more than `max_gap` times the usual one, which is the step with the same number of decoded
tokens and no prefill. What a slice costs is learned from the steps themselves:

    seconds = usual(decoded tokens) + a * tokens of slices + b * (tokens, each times the context it attends to)

a and b are fitted by least squares of the relative error, with old steps forgotten; where the last steps took longer
than that says, the allowance shrinks by as much. The first rows may cost nothing, because the weights have to be read
anyway, and one row more may cost much, because another kernel computes it. So slices grow by half at most from one step
to the next, and of small ones what they cost beyond the fit is remembered for each size. Now and then a step is left
without prefill, to see what is usual. Where prompts and decoding take turns, the two steps count as one.

A budget changes how a prompt is cut into slices and therefore when its tokens come, never which tokens come.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

ALLOWED_SHARE = 0.75
"""Of the promised gap that is planned to be used; the rest is for what steps vary by."""

LEAST_TOKENS = 2
"""A prompt gets on by so many tokens a step, whatever they cost."""

MEASURED_STEPS = 9
"""The usual step is the median of so many."""

STEPS_BEFORE_LOOKING_AGAIN = 64
"""Steps with prefill after which one is left without."""

FEW_TOKENS = 32
"""Up to so many, what a number of tokens costs beyond the fit is learned for each: kernels change with the rows."""

UNSEEN_EXCESS = 1.5
"""A small number of tokens that has not been seen yet may cost so many times what the fit says."""

GROWTH = 1.5
"""A slice has at most so many times the tokens of the last one."""

KEPT_SHARE = 0.97
"""What one more step leaves of the weight of the earlier ones."""

CONTEXT_UNIT = 1024.0
"""Tokens of context that count as one, so that both unknowns are of one size."""

Slices = Iterable[tuple[int, int]]
"""Pieces of prompts: position of the first token, number of tokens."""


@dataclass(slots=True)
class PrefillBudget:
    """What is left of one step for prompts.

    Attributes:
        tokens: new tokens at most.
        seconds: time at most, or None where only tokens count.
    """

    tokens: int
    seconds: float | None = None
    _token_s: float = 0.0
    _context_s: float = 0.0
    _excess: Mapping[int, float] = field(default_factory=dict)
    _is_untouched: bool = True

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left."""
        return self.tokens <= 0 or (self.seconds is not None and self.seconds <= 0 and not self._is_untouched)

    def most(self, start: int) -> int:
        """How many tokens a slice that begins at position `start` may have."""
        if self.seconds is None:
            return max(0, self.tokens)
        # Half the slice attends to the other half, which matters where the context is short.
        low, high = 0, max(0, self.tokens)
        while low < high:
            middle = (low + high + 1) // 2
            if self._cost(start, middle) <= self.seconds:
                low = middle
            else:
                high = middle - 1
        while (
            low
            and self._cost(start, low) * self._excess.get(low, UNSEEN_EXCESS if low <= FEW_TOKENS else 1.0)
            > self.seconds
        ):
            low -= 1
        return max(low, min(LEAST_TOKENS, self.tokens)) if self._is_untouched else low

    def spend(self, start: int, n_tokens: int) -> None:
        """Take a slice off."""
        if n_tokens > 0:
            self.tokens -= n_tokens
            self._is_untouched = False
            if self.seconds is not None:
                self.seconds -= self._cost(start, n_tokens)

    def _cost(self, start: int, n_tokens: int) -> float:
        return n_tokens * self._token_s + _reads(start, n_tokens) * self._context_s


@dataclass(slots=True)
class _Fit:
    """Sums for a least-squares fit of `z = a * x + b * y`, each step weighed by one over its seconds squared."""

    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    xz: float = 0.0
    yz: float = 0.0

    def add(self, x: float, y: float, z: float, seconds: float) -> None:
        x, y, z = x / seconds, y / seconds, z / seconds
        self.xx = KEPT_SHARE * self.xx + x * x
        self.xy = KEPT_SHARE * self.xy + x * y
        self.yy = KEPT_SHARE * self.yy + y * y
        self.xz = KEPT_SHARE * self.xz + x * z
        self.yz = KEPT_SHARE * self.yz + y * z

    def solve(self) -> tuple[float, float] | None:
        """(a, b), neither below 0; None without a measurement."""
        if self.xx == 0:
            return None
        ridge = 1e-3 * self.xx  # where contexts are all alike only the sum of both is known: then a takes it
        determinant = self.xx * (self.yy + ridge) - self.xy * self.xy
        a = (self.xz * (self.yy + ridge) - self.yz * self.xy) / determinant
        b = (self.xx * self.yz - self.xy * self.xz) / determinant
        if b < 0:
            return self.xz / self.xx, 0.0
        if a < 0:
            return 0.0, self.yz / self.yy
        return a, b


@dataclass(slots=True)
class _Usual:
    """Steps of one number of decoded tokens."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MEASURED_STEPS))
    n_since: int = 0  # steps with prefill since the last one without


class StepTimes:
    """Learns from the steps that were taken, and gives each step its budget.

    Args:
        max_gap: the promise, as a multiple of the usual step; above 1.
    """

    def __init__(self, max_gap: float) -> None:
        self._max_gap = max_gap
        self._usual: dict[int, _Usual] = {}
        self._fit = _Fit()
        self._excess = 1.0  # how much longer the last steps took than the fit says
        self._size_excess: dict[int, float] = {}  # the same for each number of tokens, where they are few
        self._n_last = LEAST_TOKENS  # tokens of the last slice beside decode
        self._looked_for: int | None = None

    def usual_s(self, n_decoded: int) -> float | None:
        """Seconds of a step that decodes so many tokens and nothing else; None if there was none yet."""
        usual = self._usual.get(n_decoded)
        return statistics.median(usual.seconds) if usual is not None and usual.seconds else None

    def budget(self, n_decoded: int, most_tokens: int, unmeasured_tokens: int) -> PrefillBudget:
        """What a step may compute of prompts beside `n_decoded` tokens of sequences that decode.

        Args:
            most_tokens: tokens at most, whatever they cost.
            unmeasured_tokens: tokens where nothing has been measured that would tell.
        """
        usual = self._usual.setdefault(n_decoded, _Usual())
        if not usual.seconds or usual.n_since >= STEPS_BEFORE_LOOKING_AGAIN:
            # Once, that is: where steps are not measured, there is nothing to wait for.
            if self._looked_for != n_decoded:
                self._looked_for = n_decoded
                return PrefillBudget(0)
            usual.n_since = 0
        costs = self._fit.solve()
        if costs is None or not usual.seconds:
            return PrefillBudget(min(most_tokens, unmeasured_tokens))
        allowed = statistics.median(usual.seconds) * (self._max_gap * ALLOWED_SHARE - 1)
        most_tokens = min(most_tokens, int(GROWTH * self._n_last) + 1)
        return PrefillBudget(most_tokens, max(0.0, allowed / self._excess), *costs, self._size_excess)

    def add(self, n_decoded: int, slices: Slices, seconds: float) -> None:
        """Note how long a step took."""
        slices = list(slices)
        if not slices:
            usual = self._usual.setdefault(n_decoded, _Usual())
            usual.seconds.append(seconds)
            usual.n_since = 0
            if self._looked_for == n_decoded:
                self._looked_for = None
            return
        usual_s = self.usual_s(n_decoded) or 0.0
        extra = max(seconds - usual_s, 0.0)
        n_tokens = sum(n for _, n in slices)
        reads = sum(_reads(start, n) for start, n in slices)
        if n_decoded:
            self._usual.setdefault(n_decoded, _Usual()).n_since += 1
            costs = self._fit.solve()
            expected = n_tokens * costs[0] + reads * costs[1] if costs is not None else 0.0
            if expected > 0 and usual_s:
                self._excess += (0.5 if extra > self._excess * expected else 0.1) * (extra / expected - self._excess)
                self._excess = min(max(self._excess, 1.0), 4.0)
                if n_tokens <= FEW_TOKENS:
                    before = self._size_excess.get(n_tokens, extra / expected)
                    self._size_excess[n_tokens] = before + 0.2 * (extra / expected - before)
            self._n_last = n_tokens
        self._fit.add(n_tokens, reads, extra, seconds)


def _reads(start: int, n_tokens: int) -> float:
    """Keys that the tokens of a slice attend to, all together, in units."""
    return n_tokens * (start + n_tokens / 2) / CONTEXT_UNIT

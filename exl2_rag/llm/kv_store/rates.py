"""Load a page or compute it again? Decided by how fast either has been so far."""

from __future__ import annotations

SMOOTHING = 0.3
"""Weight of the newest measurement."""
PROBE_EVERY = 16
"""So many times loading is declined before it is tried again, since the disk may have been slow only for a while."""


class Rate:
    """A smoothed rate. `amount` is in whatever is counted: tokens, bytes."""

    def __init__(self) -> None:
        self.per_s: float | None = None

    def measured(self, amount: float, seconds: float) -> None:
        """Take a measurement into account."""
        if amount <= 0 or seconds <= 0:
            return
        rate = amount / seconds
        self.per_s = rate if self.per_s is None else SMOOTHING * rate + (1 - SMOOTHING) * self.per_s

    def seconds(self, amount: float) -> float | None:
        """How long so much takes; None if that is not known yet."""
        return None if self.per_s is None else amount / self.per_s


class LoadOrRecompute:
    """Compares the disk's measured rate with prefill's.

    Attributes:
        prefill_tokens_per_s: as the engine computes prompts, which it says after each step; None until it knows.
        disk: bytes a second, as pages come from the store, checked and copied.
    """

    def __init__(self) -> None:
        self.prefill_tokens_per_s: float | None = None
        self.disk = Rate()
        self._n_declined = 0

    def recompute_s(self, n_tokens: int) -> float:
        """Seconds to compute so many tokens; 0 if that is not known yet."""
        return n_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0

    def should_load(self, n_bytes: int, n_tokens: int) -> bool:
        """Whether to load a page from the disk. It is, as long as one of the rates is not known."""
        load_s, compute_s = self.disk.seconds(n_bytes), self.recompute_s(n_tokens)
        if load_s is None or compute_s == 0 or load_s < compute_s:
            return True
        self._n_declined += 1
        return self._n_declined % PROBE_EVERY == 0

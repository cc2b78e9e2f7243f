"""How fast this engine computes prompts, from its own steps. No torch."""

from __future__ import annotations

MIN_PREFILL_TOKENS = 64
"""In a step with fewer, the time goes into what every step costs."""


class PrefillRate:
    """Tokens a second over all steps that were mostly prefill.

    On a card a step may return before it is done; the step that ends the prompt waits for it. So a step that goes on
    with the work of a counted one is counted as well, whatever its size.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0
        self._goes_on = False

    def note(self, n_prefill: int, n_decode: int, seconds: float) -> None:
        """Note a step of `n_prefill` tokens of prompts and `n_decode` others."""
        counts = n_prefill > 0 and n_decode * 4 <= n_prefill and (n_prefill >= MIN_PREFILL_TOKENS or self._goes_on)
        if counts:
            self._tokens += n_prefill + n_decode
            self._seconds += seconds
        self._goes_on = counts

    @property
    def tokens_per_s(self) -> float | None:
        """None before anything was measured."""
        return self._tokens / self._seconds if self._seconds > 0 else None

"""Which numbers the fields of `SamplingParams` take. Knows names and bounds; keeps nothing and draws nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from exl2_rag.errors import RequestError

MAX_LOGPROBS = 1000  # alternatives kept for every token; more is a mistake sooner than a wish


@dataclass(frozen=True, slots=True)
class Range:
    """The values a number may have.

    Attributes:
        expected: the range in words, for the message.
        low, high: bounds, inclusive unless `above` or `below` says otherwise.
        whole: only whole numbers.
        optional: None is allowed.
    """

    expected: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    optional: bool = False

    def holds(self, value: object) -> bool:
        """Whether the value lies within."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        if not math.isfinite(number):
            return False
        return (number > self.low if self.above else number >= self.low) and (
            number < self.high if self.below else number <= self.high
        )

    def check(self, name: str, value: object) -> None:
        """Refuse a value that lies outside.

        Raises:
            RequestError: it does; the message names the field, what is expected and what came.
        """
        if not self.holds(value):
            raise RequestError(f"{name} must be {self.expected}, got {value!r}")


def _count(expected: str, low: int = 0, *, optional: bool = False, high: float = math.inf) -> Range:
    return Range(expected, low, high, whole=True, optional=optional)


RANGES: dict[str, Range] = {
    "max_tokens": _count("a whole number of at least 1, or None", 1, optional=True),
    "min_tokens": _count("a whole number, 0 (off) or more"),
    "temperature": Range("0 or more", 0),
    "min_temp": Range("0 or more", 0),
    "max_temp": Range("0 (off) or more", 0),
    "temp_exponent": Range("above 0", 0, above=True),
    "smoothing_factor": Range("0 (off) or more", 0),
    "smoothing_curve": Range("from 1 to 3", 1, 3),
    "top_k": _count("a whole number, 0 (off) or more"),
    "top_p": Range("above 0 and at most 1 (off)", 0, 1, above=True),
    "min_p": Range("from 0 (off) to 1", 0, 1),
    "top_a": Range("from 0 (off) to 1", 0, 1),
    "typical_p": Range("above 0 and at most 1 (off)", 0, 1, above=True),
    "tfs": Range("above 0 and at most 1 (off)", 0, 1, above=True),
    "epsilon_cutoff": Range("from 0 (off) to below 1", 0, 1, below=True),
    "eta_cutoff": Range("from 0 (off) to below 1", 0, 1, below=True),
    "xtc_probability": Range("from 0 (off) to 1", 0, 1),
    "xtc_threshold": Range("from 0 to 1", 0, 1),
    "skew": Range("a finite number, 0 (off) is neutral"),
    "mirostat_mode": Range("0 (off) or 2", 0, 2, whole=True),
    "mirostat_tau": Range("above 0", 0, above=True),
    "mirostat_eta": Range("from 0 to 1", 0, 1),
    "repetition_penalty": Range("above 0; 1 is off", 0, above=True),
    "frequency_penalty": Range("a finite number; 0 is off"),
    "presence_penalty": Range("a finite number; 0 is off"),
    "penalty_range": _count("a whole number of at least 1, or None (all tokens)", 1, optional=True),
    "penalty_decay": _count("a whole number, 0 (off) or more"),
    "dry_multiplier": Range("0 (off) or more", 0),
    "dry_base": Range("at least 1", 1),
    "dry_allowed_length": _count("a whole number of at least 1", 1),
    "dry_range": _count("a whole number of at least 1, or None (all tokens)", 1, optional=True),
    "no_repeat_ngram_size": _count("a whole number, 0 (off) or more"),
    "cfg_scale": Range("a finite number of at least 0; 1 is off", 0),
    "logprobs": _count(f"a whole number from 0 to {MAX_LOGPROBS}, or None", optional=True, high=MAX_LOGPROBS),
    "n": _count("a whole number of at least 1", 1),
    "seed": _count("a whole number from 0 to 2**63 - 1, or None", optional=True, high=2**63 - 1),
}

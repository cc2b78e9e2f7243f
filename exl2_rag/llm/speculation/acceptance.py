"""How likely a draft token is right, learned from how it went. Knows counts only."""

from __future__ import annotations

from dataclasses import dataclass, field

MEMORY = 32.0
"""Trials that weigh as much as all before them."""
TRUST = 4.0
"""Trials of its own that make a request's rate weigh as much as that of all requests."""


@dataclass(slots=True)
class Rate:
    """A share of successes that forgets slowly.

    Attributes:
        hits, trials: weighted by how recent they are.
    """

    hits: float = 0.0
    trials: float = 0.0

    def note(self, hit: bool) -> None:
        """Count a trial."""
        keep = 1 - 1 / MEMORY
        self.hits = self.hits * keep + hit
        self.trials = self.trials * keep + 1


@dataclass(slots=True)
class Acceptance:
    """Rates by class of trial (how long the match was that a draft rests on), of one request and of all together.

    Args:
        n_classes: classes are 0 to n_classes - 1.
        shared: the rates of all requests, which a new one starts from; None: this is the one that is shared.
        first_guess: the rate before anything is known.
    """

    n_classes: int
    shared: Acceptance | None = None
    first_guess: float = 0.5
    rates: list[Rate] = field(init=False)

    def __post_init__(self) -> None:
        self.rates = [Rate() for _ in range(self.n_classes)]

    def note(self, kind: int, hit: bool) -> None:
        """Count a trial of a class."""
        self.rates[kind].note(hit)
        if self.shared is not None:
            self.shared.note(kind, hit)

    def chance(self, kind: int) -> float:
        """How likely a trial of this class is a success."""
        before = self.first_guess if self.shared is None else self.shared.chance(kind)
        rate = self.rates[kind]
        return (rate.hits + TRUST * before) / (rate.trials + TRUST)

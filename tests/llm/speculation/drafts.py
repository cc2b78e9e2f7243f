"""Proposers and costs for tests."""

from __future__ import annotations

import random
from collections.abc import Callable

from exl2_rag.llm.sequence import Sequence
from exl2_rag.llm.speculation.draft_lengths import StepCosts


class FreeRows(StepCosts):
    """A step of one row takes a second, each row more `price` seconds."""

    def __init__(self, price: float = 0.0) -> None:
        super().__init__()
        self.price = price

    def knows_below(self, n_rows: int) -> bool:
        return True

    def seconds(self, n_rows: int) -> float:
        return 1.0 + self.price * (n_rows - 1)


class Guesses:
    """Proposes what `guess` says comes next; each token is wrong now and then."""

    def __init__(self, guess: Callable[[Sequence, int], list[int]], *, wrong: float, seed: int = 0) -> None:
        self.guess = guess
        self.wrong = wrong
        self.rng = random.Random(seed)

    def chances(self, sequences: list[Sequence], limits: list[int]) -> list[list[float]]:
        return [[0.9**n for n in range(self.rng.randrange(max(0, limit) + 1))] for limit in limits]

    def propose(self, sequences: list[Sequence], lengths: list[int]) -> list[list[int]]:
        drafts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            draft = self.guess(sequence, length)
            drafts.append([(n + 1) % 90 if self.rng.random() < self.wrong else n for n in draft])
        return drafts

    def seconds(self, length: int) -> float:
        return 0.0

    def learn(self, sequence: Sequence, n_proposed: int, n_accepted: int) -> None:
        assert 0 <= n_accepted <= n_proposed

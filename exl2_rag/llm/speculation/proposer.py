"""What every way of guessing tokens has in common."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from exl2_rag.llm.sequence import Sequence


class Proposer(Protocol):
    """Guesses what sequences will say next. What it must remember of a sequence it keeps in `Sequence.drafting`.

    Sequences grow, and may also give up their last tokens and go on differently; a proposer looks at their tokens
    every time.
    """

    def chances(self, sequences: Seq[Sequence], limits: Seq[int]) -> list[list[float]]:
        """How likely the first token is right that it would propose now, the first two, and so on.

        Args:
            sequences: those that could use a draft, in the order of their ranks.
            limits: tokens that each could use at most.

        Returns:
            For each sequence up to `limits` falling numbers from 0 to 1; none where nothing can be proposed.
        """
        ...

    def propose(self, sequences: Seq[Sequence], lengths: Seq[int]) -> list[list[int]]:
        """Drafts of at most these lengths, after `chances` was called for the same sequences."""
        ...

    def seconds(self, length: int) -> float:
        """How long it takes to propose drafts of which the longest has so many tokens."""
        ...

    def learn(self, sequence: Sequence, n_proposed: int, n_accepted: int) -> None:
        """Of the draft of a sequence, `n_accepted` tokens were right; if that is not all, the next one was wrong."""
        ...

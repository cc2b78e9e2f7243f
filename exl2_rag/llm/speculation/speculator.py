"""Gives sequences drafts before a step, and learns from the step how that went. Knows integers and seconds, no tensors.

A draft is tokens that are computed along with the sequence's own, each one row of the step. Whether they are right is
seen when the tokens are drawn, one after the other, by the same sampler, constraint and random numbers as ever: as long
as the token that is drawn is the draft's, the logits after it are there already. So the text is the same to the token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from exl2_rag.llm.speculation.draft_lengths import StepCosts, choose_lengths
from exl2_rag.llm.speculation.proposer import Proposer

if TYPE_CHECKING:
    from exl2_rag.llm.scheduler import Slice
    from exl2_rag.llm.sequence import Sequence

MOST_DRAFT_TOKENS = 15
"""Of one sequence in one step."""
MOST_ROWS = 64
"""Rows of a step beyond which nothing is drafted: then the arithmetic is what takes the time."""


class Speculator:
    """Decides who gets a draft, and how long.

    Args:
        proposer: guesses the tokens.
        max_draft_tokens: of one sequence in one step.
        costs: what steps take; None: nothing is known yet.

    Attributes:
        n_steps, n_proposed, n_accepted: of all sequences: steps with a draft, draft tokens, those that were right.
    """

    def __init__(
        self, proposer: Proposer, *, max_draft_tokens: int = MOST_DRAFT_TOKENS, costs: StepCosts | None = None
    ) -> None:
        self._proposer = proposer
        self._max_draft_tokens = max_draft_tokens
        self._costs = StepCosts() if costs is None else costs
        self.n_steps = self.n_proposed = self.n_accepted = 0

    def draft(self, running: Iterable[Sequence]) -> None:
        """Set `draft` of the sequences that decode."""
        n_rows = 0
        ready: list[Sequence] = []
        for one in running:
            one.draft = ()
            if one.is_decoding:
                n_rows += one.n_pending
                if one.takes_drafts:
                    ready.append(one)
        if not ready or n_rows >= MOST_ROWS:
            return
        most = min(self._max_draft_tokens, MOST_ROWS - n_rows)
        # The token after the draft is drawn without a row of its own.
        limits = [min(most, one.max_new_tokens - one.n_new - 1) for one in ready]
        chances = self._proposer.chances(ready, limits)
        if not any(chances) or not self._costs.knows_below(n_rows):
            return
        lengths = choose_lengths(chances, n_rows, self._costs.seconds, self._proposer.seconds)
        if not any(lengths):
            return
        for one, draft in zip(ready, self._proposer.propose(ready, lengths), strict=True):
            one.draft = tuple(self._possible(one, draft))

    def note_step(self, slices: Iterable[Slice], seconds: float) -> None:
        """A step took so long."""
        n_rows = 0
        for one in slices:
            if not one.decodes:
                return
            n_rows += one.n_rows
        if n_rows:
            self._costs.note(n_rows, seconds)

    def step_costs(self) -> dict[int, float]:
        """Seconds that decode steps of so many rows took."""
        return dict(self._costs.known())

    def learn(self, sequence: Sequence, n_proposed: int, n_accepted: int) -> None:
        """Of the draft that a sequence had in a step, so many tokens were right."""
        counts = sequence.speculation
        counts.steps += 1
        counts.proposed_tokens += n_proposed
        counts.accepted_tokens += n_accepted
        self.n_steps += 1
        self.n_proposed += n_proposed
        self.n_accepted += n_accepted
        self._proposer.learn(sequence, n_proposed, n_accepted)

    def _possible(self, sequence: Sequence, draft: list[int]) -> list[int]:
        """The tokens of a draft up to the first that ends the text or that the constraint forbids."""
        for place, token_id in enumerate(draft):
            if token_id in sequence.stop_token_ids:
                draft = draft[:place]
                break
        if draft and sequence.matcher is not None:
            draft = draft[: sequence.matcher.count_allowed(draft)]
        return draft

"""Drafts by looking up where the last tokens occurred before, in the prompt or in the text itself.

Answers about documents copy from them. The longest ending of the text that occurred before is found in a suffix
automaton, and what followed it there is the draft. That costs microseconds, so the guess is made for every token,
drafted or not, and compared with what came: rates of success by length of match, which say what is worth drafting.
A request that copies nothing is thus left alone at once, and one that begins to copy is noticed while it does.

Source: Saxena, "Prompt lookup decoding" (2023), with n-grams; Hu et al., "SAM decoding" (2024), with an automaton.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from exl2_rag.llm.speculation.acceptance import Acceptance
from exl2_rag.llm.speculation.suffix_automaton import SuffixAutomaton

if TYPE_CHECKING:
    from exl2_rag.llm.sequence import Sequence

MIN_MATCH = 2
"""Tokens that must have occurred before."""
CLASS_LIMITS = (2, 3, 4, 6, 10, 18)
"""Longest match of each class of matches; longer ones are of the last class."""
COMPARED_TOKENS = 32
"""Of the tokens taken in, so many last ones are compared with the sequence's, which may have given up some."""


class _Lookup:
    """What is known of one sequence: its tokens, and how its guesses went."""

    def __init__(self, token_ids: Seq[int], shared: Acceptance) -> None:
        self.automaton = SuffixAutomaton(token_ids)
        self.acceptance = Acceptance(shared.n_classes, shared)

    def follow(self, token_ids: Seq[int]) -> None:
        """Take in what came since the last time, and see whether it had been guessed."""
        automaton = self.automaton
        known = automaton.token_ids
        start = max(0, len(known) - COMPARED_TOKENS)
        if token_ids[start : len(known)] != known[start:]:
            # It went another way. The automaton starts anew, or it would propose the way that was given up.
            self.automaton = SuffixAutomaton(token_ids)
            return
        for place in range(len(known), len(token_ids)):
            token_id = token_ids[place]
            if automaton.n_recurring >= MIN_MATCH:
                self.acceptance.note(match_class(automaton.n_recurring), known[automaton.recurred_at] == token_id)
            automaton.extend(token_id)

    def chances(self, limit: int) -> list[float]:
        n_matching = self.automaton.n_recurring
        if n_matching < MIN_MATCH or limit <= 0:
            return []
        falling, chance = [], 1.0
        for place in range(limit):
            chance *= self.acceptance.chance(match_class(n_matching + place))
            falling.append(chance)
        return falling


class PromptLookup:
    """A proposer for any number of sequences; see `Proposer`."""

    def __init__(self) -> None:
        self._shared = Acceptance(len(CLASS_LIMITS) + 1)

    def chances(self, sequences: Seq[Sequence], limits: Seq[int]) -> list[list[float]]:
        """See `Proposer.chances`."""
        return [self._lookup(one).chances(limit) for one, limit in zip(sequences, limits, strict=True)]

    def propose(self, sequences: Seq[Sequence], lengths: Seq[int]) -> list[list[int]]:
        """See `Proposer.propose`."""
        return [
            self._known(one).automaton.continuation(length) if length else []
            for one, length in zip(sequences, lengths, strict=True)
        ]

    def seconds(self, length: int) -> float:
        """Nothing worth counting."""
        return 0.0

    def learn(self, sequence: Sequence, n_proposed: int, n_accepted: int) -> None:
        """The tokens themselves say all there is to learn."""

    def _lookup(self, sequence: Sequence) -> _Lookup:
        """What is known of a sequence, up to its last token."""
        if sequence.drafting is None:
            sequence.drafting = _Lookup(sequence.token_ids, self._shared)
        lookup = self._known(sequence)
        lookup.follow(sequence.token_ids)
        return lookup

    def _known(self, sequence: Sequence) -> _Lookup:
        assert isinstance(sequence.drafting, _Lookup)
        return sequence.drafting


def match_class(length: int) -> int:
    """The class of matches of so many tokens."""
    for kind, limit in enumerate(CLASS_LIMITS):
        if length <= limit:
            return kind
    return len(CLASS_LIMITS)

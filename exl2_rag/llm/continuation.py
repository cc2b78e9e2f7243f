"""Adds tokens to a text in progress, and takes them back where a banned string has come about.

Knows sequences and what hangs on them (text, constraint, sampler); knows no logits and no scheduling.
"""

from __future__ import annotations

from collections.abc import Callable

from exl2_rag.errors import BannedStringsError, EngineError
from exl2_rag.llm.sampler import DrawnToken
from exl2_rag.llm.sequence import Sequence

KEPT_BACK_TOKENS = 32
"""Tokens held back where a constraint meets banned strings: it may lead to one with no way round but further back."""
MOST_BANS = 2000
"""How often a text may run into banned strings; each time costs a step."""


class Continuation:
    """Lets sequences go on, one token after the other.

    Args:
        token_text: the text of one token by itself.
        forget_rows: lets go of what was computed for tokens that a sequence has given up.
    """

    def __init__(self, token_text: Callable[[int], str], forget_rows: Callable[[Sequence], None]) -> None:
        self._token_text = token_text
        self._forget_rows = forget_rows

    def take(self, sequence: Sequence, choice: DrawnToken) -> None:
        """Append a token that was drawn, and what a constraint forces after it; set the finish reason at the end.

        Raises:
            ConstraintError: the constraint gives up.
            BannedStringsError: banned strings leave no way on.
            EngineError: constraint and `min_tokens` contradict each other.
        """
        if sequence.logprobs is not None and choice.measured is not None:
            sequence.logprobs.append(choice.measured.as_token_logprob(self._token_text))
        self._append(sequence, choice.token_id)
        if sequence.forced:
            sequence.forced.pop(0)
        if not sequence.forced:
            self.append_forced(sequence, at_most=sequence.max_new_tokens)

    def leave_dead_end(self, sequence: Sequence) -> None:
        """Go one token further back, since every way on from here leads to a banned string.

        Raises:
            BannedStringsError: there is no token to take back.
        """
        if sequence.output is None or not sequence.output.n_tokens_held:
            raise BannedStringsError(
                "every way to go on leads to a banned string, and the text before it has been handed out or is the "
                "prompt; relax banned_strings, the constraint or allowed_tokens"
            )
        self._call_back(sequence, 1)

    def _append(self, sequence: Sequence, token_id: int) -> None:
        """Add one token to the continuation, and set the finish reason if it is the last."""
        assert sequence.output is not None
        sequence.append(token_id)
        if token_id in sequence.stop_token_ids:
            sequence.finish_reason = "stop"
            return
        if sequence.matcher is not None:
            sequence.matcher.advance(token_id)
        has_stopped = sequence.output.push(token_id, may_stop=sequence.n_new >= sequence.sampling.min_tokens)
        if sequence.output.n_banned_tokens:
            self._call_back(sequence, sequence.output.n_banned_tokens)
            return
        is_finished = sequence.matcher is not None and sequence.matcher.is_finished
        if is_finished and sequence.n_new < sequence.sampling.min_tokens:
            raise EngineError(
                f"the constraint ends the text after {sequence.n_new} tokens, min_tokens asks for "
                f"{sequence.sampling.min_tokens}; relax one of them"
            )
        if has_stopped or is_finished:
            sequence.finish_reason = "stop"
        elif sequence.n_new >= sequence.max_new_tokens:
            sequence.finish_reason = "length"

    def append_forced(self, sequence: Sequence, *, at_most: int) -> None:
        """Add the tokens that the constraint leaves no choice about, up to `at_most` new tokens in all."""
        if sequence.matcher is None or sequence.finish_reason is not None:
            return
        tokens = sequence.matcher.forced_tokens()
        if sequence.logprobs is not None:  # each needs the model's opinion, one step after the other
            sequence.forced = tokens[: max(0, at_most - sequence.n_new)]
            return
        for token_id in tokens:
            if sequence.n_new >= at_most or sequence.finish_reason is not None:
                return
            if sequence.sampler is not None and not sequence.sampler.may_draw(token_id, sequence.n_new):
                return  # the sampler will find that nothing is left, and say why
            if token_id in sequence.bans.get(len(sequence.token_ids), ()):
                return
            n_new = sequence.n_new
            self._append(sequence, token_id)
            if sequence.n_new <= n_new:  # a banned string called it back
                return

    def _call_back(self, sequence: Sequence, n_tokens: int) -> None:
        """Take the last tokens back, in the first of which a banned string began, and keep that one off its place."""
        token_id = sequence.token_ids[-n_tokens]
        sequence.roll_back(n_tokens)
        self._forget_rows(sequence)
        sequence.ban_next(token_id)
        if sequence.n_bans > MOST_BANS:
            raise BannedStringsError(
                f"the text ran into banned strings {MOST_BANS} times and could not get past them; ban fewer strings"
            )

"""Log-probabilities that come back with a token: natural logarithms, of the model and of what was drawn from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely one token was at its place.

    Attributes:
        token_id, text: the token; a token that is only a part of a character reads as "\ufffd".
        logprob: the model's own, before anything else; None for a first token, which nothing precedes.
        processed_logprob: in the distribution that was drawn from, after penalties, masks and all samplers: 0 for a
            token without an alternative (greedy, or forced by a constraint), -inf for one that could not come; None
            where nothing was drawn (tokens of a prompt).
        top: the most likely tokens by the model at this place, most likely first.
        top_processed: the same by the distribution that was drawn from; only tokens that could come.
    """

    token_id: int
    text: str
    logprob: float | None
    processed_logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    top_processed: tuple[TokenLogprob, ...] = ()

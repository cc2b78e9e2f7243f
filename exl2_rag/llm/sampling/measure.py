"""Log-probabilities of a token that was drawn, and of the most likely ones beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.llm.logprobs import TokenLogprob


@dataclass(frozen=True, slots=True)
class Measured:
    """Natural logarithms of probabilities, by token id.

    Attributes:
        token_id, logprob, processed: the token that was drawn; by the model, and in what it was drawn from.
        top, top_processed: id, logprob and processed of the most likely tokens by either, most likely first.
    """

    token_id: int
    logprob: float
    processed: float
    top: tuple[tuple[int, float, float], ...] = ()
    top_processed: tuple[tuple[int, float, float], ...] = ()

    def as_token_logprob(self, text_of: Callable[[int], str]) -> TokenLogprob:
        """The same for a caller, with the texts of the tokens."""

        def plain(ones: tuple[tuple[int, float, float], ...]) -> tuple[TokenLogprob, ...]:
            return tuple(TokenLogprob(token_id, text_of(token_id), raw, drawn) for token_id, raw, drawn in ones)

        return TokenLogprob(
            self.token_id,
            text_of(self.token_id),
            self.logprob,
            self.processed,
            plain(self.top),
            plain(self.top_processed),
        )


def log_softmax(logits: Tensor) -> Tensor:
    """[..., V] logits as float64 log-probabilities."""
    return logits.double().log_softmax(dim=-1)


def measure(logits: Tensor, scores: Tensor | None, token_id: int, n_top: int) -> Measured:
    """Measure one row.

    Args:
        logits: [V] the model's own, of any float type.
        scores: [V] float64 what was drawn from, up to a constant; None: the token was certain.
        n_top: how many of the most likely tokens are wanted.
    """
    raw = log_softmax(logits)
    if scores is None:
        drawn = torch.full_like(raw, -torch.inf)
        drawn[token_id] = 0.0
    else:
        drawn = log_softmax(scores)

    def top(of: Tensor) -> tuple[tuple[int, float, float], ...]:
        if not n_top:
            return ()
        values, ids = of.topk(min(n_top, len(of)))
        ranked = sorted(zip(values.tolist(), ids.tolist(), strict=True), key=lambda one: (-one[0], one[1]))
        return tuple((one, float(raw[one]), float(drawn[one])) for value, one in ranked if value > -torch.inf)

    return Measured(token_id, float(raw[token_id]), float(drawn[token_id]), top(raw), top(drawn))

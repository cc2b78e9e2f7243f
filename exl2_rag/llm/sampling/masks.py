"""Which tokens may be drawn at all: bias, bans, allowed tokens, the minimum length and the constraint."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl2_rag.llm.sampling.state import SamplerState

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]


def add_bias(scores: Scores, state: SamplerState) -> None:
    """Add the logit bias to one row, [V], in place."""
    scores[state.bias_ids] += state.bias


def forbid(scores: Scores, state: SamplerState, n_new: int, constraint: Mask | None) -> None:
    """Set what may not be drawn to -inf in one row, [V], in place.

    Args:
        n_new: new tokens so far.
        constraint: [V] True where the constraint allows a token; None: everywhere.
    """
    if constraint is not None:
        scores[~constraint] = -np.inf
    if state.allowed_ids is not None:
        kept = scores[state.allowed_ids].copy()
        scores[:] = -np.inf
        scores[state.allowed_ids] = kept
    scores[state.banned_ids] = -np.inf
    if n_new < state.params.min_tokens:
        scores[state.end_ids] = -np.inf


def why_nothing_is_left(state: SamplerState | None, n_new: int, constraint: Mask | None) -> str:
    """What rules out all tokens, in words."""
    reasons = [] if constraint is None else ["the constraint"]
    if state is not None:
        params = state.params
        reasons += [name for name in ("allowed_tokens", "banned_tokens") if getattr(params, name)]
        if params.no_repeat_ngram_size:
            reasons.append("no_repeat_ngram_size")
        if n_new < params.min_tokens:
            reasons.append(f"min_tokens (after {n_new} of {params.min_tokens})")
    if len(reasons) > 1:
        return f"{', '.join(reasons[:-1])} and {reasons[-1]} together leave none; relax one of them"
    if reasons and constraint is None:
        return f"{reasons[0]} leaves none; relax it"
    return "the constraint and the vocabulary do not fit together"

"""What keeps text from repeating itself: DRY, and the ban on repeated n-grams.

Source of DRY: "Don't Repeat Yourself" by p-e-w, text-generation-webui pull request 5677. Of n-grams: transformers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl2_rag.llm.sampling.state import SamplerState

Scores = NDArray[np.float64]
ENOUGH = 1e6  # logits: a token that has lost so much cannot come, so longer repetitions need no telling apart


def dry(scores: Scores, state: SamplerState) -> None:
    """Take from each token what DRY takes.

    For every place whose next token is t, n is how many tokens up to that place agree with the last n of the history,
    none of them a breaker. Of all places with the same t the longest counts.

    Args:
        scores: [V] logits; changed in place.
        state: its history is up to date.
    """
    params = state.params
    tokens = state.history.last(params.dry_range)
    if len(tokens) < 2:
        return
    is_breaker = np.isin(tokens, state.breakers)
    # Places, before the last one, up to which the last `length` tokens occur, and what came after each.
    places = np.flatnonzero(tokens[:-1] == tokens[-1]) if not is_breaker[-1] else np.empty(0, dtype=np.int64)
    length = 1
    while len(places):
        if length >= params.dry_allowed_length:
            penalty = params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
            following = tokens[places + 1]
            following = np.unique(following[following < len(scores)])
            # What a shorter repetition took is made up to what this longer one takes.
            shorter = 0.0 if length == params.dry_allowed_length else penalty / params.dry_base
            scores[following] -= penalty - shorter
            if penalty >= ENOUGH:
                return
        back = len(tokens) - 1 - length
        if back < 0 or is_breaker[back]:
            return
        places = places[places >= length]
        places = places[tokens[places - length] == tokens[back]]
        length += 1


def ban_repeated_ngrams(scores: Scores, state: SamplerState) -> None:
    """Rule out every token that would complete an n-gram that the history holds already.

    Args:
        scores: [V] logits; changed in place.
        state: its history is up to date.
    """
    size = state.params.no_repeat_ngram_size
    tokens = state.history.last()
    if len(tokens) < size:
        return
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    same = (windows[:, :-1] == tokens[len(tokens) - size + 1 :]).all(axis=1)
    banned = windows[same, -1]
    scores[banned[banned < len(scores)]] = -np.inf

"""Repetition, frequency and presence penalty, with a range and a ramp before it.

Sources: repetition penalty as in CTRL (arXiv 1909.05858) and transformers, over prompt and text; frequency and
presence penalty as the OpenAI API and vLLM have them, over the text alone; range and ramp as in ExLlamaV2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl2_rag.llm.sampling.state import SamplerState

Scores = NDArray[np.float64]


def applies(state: SamplerState) -> bool:
    """Whether any of the three is on."""
    params = state.params
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def penalise(scores: Scores, state: SamplerState) -> None:
    """Apply the penalties to one row.

    Args:
        scores: [V] logits; changed in place.
        state: its history is up to date.
    """
    params = state.params
    if params.repetition_penalty != 1:
        ids, newest, _ = _occurrences(state, from_text=False, vocab_size=len(scores))
        factor = 1 + (params.repetition_penalty - 1) * newest
        old = scores[ids]
        scores[ids] = np.where(old < 0, old * factor, old / factor)
    if params.frequency_penalty != 0 or params.presence_penalty != 0:
        ids, newest, total = _occurrences(state, from_text=True, vocab_size=len(scores))
        scores[ids] -= params.presence_penalty * newest + params.frequency_penalty * total


def _occurrences(
    state: SamplerState, *, from_text: bool, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The distinct tokens in range, the strength of the newest occurrence of each, and the sum over all of them.

    A token d places before the end has strength 1 for d < range, then 1 - (d - range) / decay down to 0.
    """
    params = state.params
    reach = None if params.penalty_range is None else params.penalty_range + params.penalty_decay
    if from_text:
        n_text = len(state.history) - state.n_prompt
        reach = n_text if reach is None else min(reach, n_text)
    newest_first = state.history.last(reach)[::-1]
    newest_first = newest_first[newest_first < vocab_size]
    ids, places, inverse = np.unique(newest_first, return_index=True, return_inverse=True)
    if params.penalty_range is None:
        strength = np.ones(len(newest_first))
    else:
        beyond = np.arange(len(newest_first)) - params.penalty_range
        strength = np.where(beyond < 0, 1.0, 1.0 - beyond / max(1, params.penalty_decay))
    return ids, strength[places], np.bincount(inverse, weights=strength, minlength=len(ids)).astype(np.float64)

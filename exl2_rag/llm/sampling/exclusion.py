"""Stages that look beyond the distribution: XTC (at chance) and mirostat (at what came before). See `scores.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exl2_rag.llm.sampling.scores import column, drop, shifted, total
from exl2_rag.llm.sampling.state import SamplerState


def xtc(scores: Tensor, states: Sequence[SamplerState], numbers: Sequence[float]) -> Tensor:
    """With each row's probability drop all tokens at least as likely as the threshold but the least likely of them.

    Args:
        numbers: R uniform ones; below the row's probability, tokens are dropped.

    Source: "Exclude top choices" by p-e-w, text-generation-webui pull request 6335. Of equals, the lowest id stays.
    """
    weights = scores.exp()
    least = column([one.params.xtc_threshold for one in states], scores) * total(weights)
    likely = (weights >= least) & (weights > 0)
    for row, (state, number) in enumerate(zip(states, numbers, strict=True)):
        if number >= state.params.xtc_probability:
            likely[row] = False
        elif len(state.xtc_ignored):
            likely[row, torch.from_numpy(state.xtc_ignored).to(scores.device)] = False
    smallest = torch.where(likely, weights, torch.inf).amin(dim=-1, keepdim=True)
    stays = likely & (weights == smallest)
    stays &= stays.cumsum(dim=-1) == 1
    return shifted(drop(scores, likely & ~stays))


def mirostat(scores: Tensor, states: Sequence[SamplerState], steps: Sequence[int]) -> Tensor:
    """Drop tokens of more surprise than mu bits, but never the most likely ones.

    Source: mirostat 2.0, algorithm 2 of arXiv 2007.14966.
    """
    weights = scores.exp()
    least = column([2.0 ** -state.mu(step) for state, step in zip(states, steps, strict=True)], scores)
    return drop(scores, (weights < least * total(weights)) & (scores < 0))

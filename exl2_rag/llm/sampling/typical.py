"""Stages that drop tokens by the shape of the distribution: locally typical and tail-free sampling. See `scores.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exl2_rag.llm.sampling.params import SamplingParams
from exl2_rag.llm.sampling.scores import column, drop, entropy, keep_most_likely, shifted, total


def typical_p(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until their mass reaches p; ties with the last stay.

    Source: arXiv 2202.00666, as in transformers. The most likely token may be dropped.
    """
    weights = scores.exp()
    mass = total(weights)
    away = (mass.log() - scores - entropy(scores, weights, mass)).abs()  # inf where a token is out
    ordered, places = away.sort(dim=-1, stable=True)
    reached = weights.gather(-1, places).cumsum(dim=-1)
    wanted = column([one.typical_p for one in params], scores) * reached[:, -1:]
    last = (reached < wanted).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    return shifted(drop(scores, away > ordered.gather(-1, last)))


def tfs(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keep tokens, most likely first, until z of the curvature of the sorted probabilities is used up.

    The curvature is the absolute second difference; the cut is put in its middle, so one token more is kept. Equal
    probabilities have none, and all tokens stay.
    Source: "Tail free sampling" by Trenton Bricken, as in text-generation-webui and ExLlamaV2.
    """
    if scores.shape[-1] < 3:
        return scores
    weights = scores.exp()
    ordered = weights.sort(dim=-1, descending=True).values
    used = ordered.diff(dim=-1).diff(dim=-1).abs().cumsum(dim=-1)
    wanted = column([one.tfs for one in params], scores) * used[:, -1:]
    n_kept = 1 + (used <= wanted).sum(dim=-1, keepdim=True)
    n_kept = torch.where(used[:, -1:] > 0, n_kept, scores.shape[-1])
    return keep_most_likely(scores, weights, ordered.gather(-1, n_kept - 1), n_kept)

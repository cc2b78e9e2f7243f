"""Stages that drop tokens by their rank or their probability. For what scores are see `scores.py`.

top-k, top-p, min-p, epsilon and eta are those of transformers; top-a is that of RWKV-LM and ExLlamaV2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exl2_rag.llm.sampling.params import SamplingParams
from exl2_rag.llm.sampling.scores import column, drop, entropy, keep_most_likely, total

TOP_P_CANDIDATES = 256  # sorting so many usually suffices; a flatter distribution is sorted whole


def top_k(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keep the k most likely tokens, and all as likely as the k-th; k = 0 keeps all."""
    vocab_size = scores.shape[-1]
    counts = [min(one.top_k or vocab_size, vocab_size) for one in params]
    limited = [count for count in counts if count < vocab_size]
    if not limited:
        return scores
    top = scores.topk(max(limited), dim=-1).values
    lowest = [
        top[row, count - 1] if count < vocab_size else torch.full_like(top[row, 0], -torch.inf)
        for row, count in enumerate(counts)
    ]
    return drop(scores, scores < torch.stack(lowest)[:, None])


def top_p(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keep a token while the tokens before it, most likely first, have less than p of the mass."""
    weights = scores.exp()
    wanted = column([one.top_p for one in params], scores) * total(weights)
    ordered = weights.topk(min(TOP_P_CANDIDATES, weights.shape[-1]), dim=-1).values
    if (ordered.cumsum(dim=-1)[:, -1:] < wanted).any():
        ordered = weights.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    n_kept = (before < wanted).sum(dim=-1, keepdim=True).clamp(min=1)
    return keep_most_likely(scores, weights, ordered.gather(-1, n_kept - 1), n_kept)


def min_p(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Drop tokens less likely than a share of the most likely one; that one has weight 1, so no sum is needed."""
    return drop(scores, scores.exp() < column([one.min_p for one in params], scores))


def top_a(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Drop tokens less likely than a times the square of the largest probability."""
    weights = scores.exp()
    return drop(scores, weights < column([one.top_a for one in params], scores) / total(weights))


def epsilon_cutoff(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Drop tokens less likely than epsilon, but never the most likely ones."""
    weights = scores.exp()
    least = column([one.epsilon_cutoff for one in params], scores)
    return drop(scores, (weights < least * total(weights)) & (scores < 0))


def eta_cutoff(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Drop tokens less likely than min(eta, sqrt(eta) * exp(-entropy)), but never the most likely ones.

    Source: arXiv 2210.15191.
    """
    weights = scores.exp()
    mass = total(weights)
    eta = column([one.eta_cutoff for one in params], scores)
    least = torch.minimum(eta, eta.sqrt() * (-entropy(scores, weights, mass)).exp())
    return drop(scores, (weights < least * mass) & (scores < 0))

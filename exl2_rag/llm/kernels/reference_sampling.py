"""The sampling op in plain torch, in float64, one row at a time; see `reference.py` for what a reference is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from exl2_rag.llm.kernels.sampling_params import RowSampling

_WORD_BITS = 32


def allowed_tokens(mask: Tensor, vocab_size: int) -> Tensor:
    """[B, W] int32, bit i % 32 of word i / 32 for token i, to [B, V] bool."""
    bits = (mask[..., None] >> torch.arange(_WORD_BITS, device=mask.device)) & 1
    return bits.flatten(-2)[..., :vocab_size].bool()


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) that belongs to this seed and step."""
    bits = int(np.random.Philox(key=seed, counter=step).random_raw())
    return (bits >> 11) * 2.0**-53


def sample(logits: Tensor, mask: Tensor | None, rows: RowSampling) -> tuple[Tensor, Tensor]:
    """[B] int64 tokens, -1 where none may be drawn, and [B] float32 log-probabilities of the unmasked logits."""
    masked = logits
    if mask is not None:
        masked = logits.masked_fill(~allowed_tokens(mask, logits.shape[1]), float("-inf"))
    tokens = torch.full((logits.shape[0],), -1, dtype=torch.int64, device=logits.device)
    for row, scores in enumerate(masked.double()):
        best = scores.max()
        if best.isfinite():
            tokens[row] = (scores == best).nonzero()[0, 0] if rows.temperatures[row] == 0 else _draw(scores, rows, row)
    chosen = torch.log_softmax(logits.double(), dim=-1).gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    return tokens, torch.where(tokens >= 0, chosen, float("nan")).to(torch.float32)


def _draw(logits: Tensor, rows: RowSampling, row: int) -> Tensor:
    weights = ((logits - logits.max()) / rows.temperatures[row]).exp()
    # By weight, and of equals by id.
    order = torch.sort(weights, descending=True, stable=True).indices
    if 0 < (k := int(rows.top_k[row])) < len(weights):
        order = order[logits[order] >= logits[order[k - 1]]]
    if (top_p := float(rows.top_p[row])) < 1:
        ordered = weights[order]
        before = ordered.cumsum(0) - ordered
        order = order[before < top_p * ordered.sum()]
    order = order[weights[order] >= float(rows.min_p[row])]
    ids = order.sort().values
    running = weights[ids].cumsum(0)
    number = uniform(int(rows.seeds[row]), int(rows.steps[row])) * running[-1]
    return ids[torch.searchsorted(running, number, right=True)]

"""Draws the next token of each row of logits. Knows nothing of requests, text or pages.

The filters are those of transformers, in its order: temperature, top-k, top-p (which keeps the token that crosses the
threshold), min-p; each works on the distribution the one before left. What a row draws depends on its logits, its
parameters, its seed and its step alone, never on the other rows: the uniform number comes from a counter-based
generator keyed by the seed, sums run in a fixed order, and ties go to the lowest id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exl2_rag.errors import EngineError
from exl2_rag.llm.device_sampler import sample_rows
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.request import SamplingParams

TOP_P_CANDIDATES = 256  # sorting so many usually suffices; a flatter distribution is sorted whole


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw one row's token.

    Attributes:
        params: temperature, top_k, top_p and min_p are read.
        seed, step: name the uniform number; the step is the count of tokens drawn before.
        allowed: [V] bool, or None for all.
    """

    params: SamplingParams
    seed: int
    step: int
    allowed: NDArray[np.bool_] | None = None


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draw one token a row.

    Args:
        logits: [L, V] float32. Not modified.
        draws: L of them.

    Returns:
        L token ids.

    Raises:
        EngineError: a row has no token that may be drawn, or holds NaN; the message names the first such row.
    """
    if logits.device.type == "cuda":
        return _sample_on_card(logits, draws)
    logits = _masked(logits, draws)
    if logits.device.type == "cpu" and all(draw.params.temperature == 0 for draw in draws):
        return _greedy(logits.numpy())
    best = logits.amax(dim=-1)  # NaN if there is one
    for row in (~torch.isfinite(best)).nonzero().flatten().tolist():
        raise EngineError(_why_not(float(best[row]), row))
    # The lowest id among equals; argmax promises no order.
    ids = torch.arange(logits.shape[-1], device=logits.device)
    tokens = torch.where(logits == best[:, None], ids, logits.shape[-1]).amin(dim=-1)
    random_rows = [row for row, draw in enumerate(draws) if draw.params.temperature > 0]
    if random_rows:
        rows = torch.tensor(random_rows, device=logits.device)
        tokens[rows] = _draw(logits[rows], [draws[row] for row in random_rows])
    return [int(token) for token in tokens.tolist()]


def _sample_on_card(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    from exl2_rag.llm.kernels import cuda_runtime

    return sample_with(cuda_runtime.backend(logits.device), logits, draws)


def sample_with(backend: Backend, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """As `sample`, by the kernel of a CUDA backend."""
    tokens = sample_rows(
        backend,
        logits,
        [draw.params for draw in draws],
        [draw.seed for draw in draws],
        [draw.step for draw in draws],
        [draw.allowed for draw in draws],
    )
    if min(tokens, default=0) < 0:
        row = next(row for row, token in enumerate(tokens) if token < 0)
        raise EngineError(_why_not(float(_masked(logits[row : row + 1], draws[row : row + 1]).amax()), row))
    return tokens


def _greedy(logits: NDArray[np.float32]) -> list[int]:
    """The most likely token of each row. numpy's argmax takes the first among equals, and NaN above all."""
    tokens = [int(row.argmax()) for row in logits]
    for row, token in enumerate(tokens):
        best = float(logits[row, token])
        if not np.isfinite(best):
            raise EngineError(_why_not(best, row))
    return tokens


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        logits: [L, V] with a finite maximum in each row.
        params: L of them, each with a temperature above 0.

    Returns:
        [L, V] float64: the logits, divided by the temperature and shifted to a maximum of 0; -inf where filtered out.
    """
    scores = logits.double()
    # The maximum goes first, so that no temperature, however small, makes inf - inf.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / _column([one.temperature for one in params], scores)
    if any(one.top_k for one in params):
        scores = _keep_top_k(scores, [one.top_k or scores.shape[-1] for one in params])
    if any(one.top_p < 1 for one in params):
        rows = torch.tensor([row for row, one in enumerate(params) if one.top_p < 1], device=scores.device)
        scores[rows] = _keep_top_p(scores[rows], _column([one.top_p for one in params if one.top_p < 1], scores))
    if any(one.min_p > 0 for one in params):
        # The most likely token has exp(0) = 1, so its share needs no sum.
        least = _column([one.min_p for one in params], scores)
        scores = scores.masked_fill(scores.exp() < least, -torch.inf)
    return scores


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) that belongs to this seed and step."""
    bits = int(np.random.Philox(key=seed, counter=step).random_raw())
    return (bits >> 11) * 2.0**-53


def _masked(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    if all(draw.allowed is None for draw in draws):
        return logits
    masked = logits.clone()
    for row, draw in enumerate(draws):
        if draw.allowed is not None:
            masked[row].masked_fill_(torch.from_numpy(~draw.allowed).to(logits.device), -torch.inf)
    return masked


def _draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[L] tokens: the first id at which the running sum of probabilities passes the uniform number."""
    weights = filter_logits(logits, [draw.params for draw in draws]).exp()
    running = weights.cumsum(dim=-1)
    numbers = _column([uniform(draw.seed, draw.step) for draw in draws], running)
    return torch.searchsorted(running, numbers * running[:, -1:], right=True).squeeze(-1)


def _keep_top_k(scores: Tensor, k: Sequence[int]) -> Tensor:
    """All tokens as likely as the k-th are kept, as in transformers."""
    counts = [min(count, scores.shape[-1]) for count in k]
    limited = [count for count in counts if count < scores.shape[-1]]
    if not limited:
        return scores
    top = scores.topk(max(limited), dim=-1).values
    lowest = [
        top[row, count - 1] if count < scores.shape[-1] else torch.full_like(top[row, 0], -torch.inf)
        for row, count in enumerate(counts)
    ]
    return scores.masked_fill(scores < torch.stack(lowest)[:, None], -torch.inf)


def _keep_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """Keep a token while the tokens before it, most likely first, have less than `top_p` of the mass."""
    weights = scores.exp()
    wanted = top_p * weights.cumsum(dim=-1)[:, -1:]
    ordered = weights.topk(min(TOP_P_CANDIDATES, weights.shape[-1]), dim=-1).values
    if (ordered.cumsum(dim=-1)[:, -1:] < wanted).any():
        ordered = weights.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    n_kept = (before < wanted).sum(dim=-1, keepdim=True).clamp(min=1)
    # Of those as likely as the last one kept, the lowest ids stay.
    least = ordered.gather(-1, n_kept - 1)
    above, equal = weights > least, weights == least
    n_equal = n_kept - above.sum(dim=-1, keepdim=True)
    return scores.masked_fill(~(above | (equal & (equal.cumsum(dim=-1) <= n_equal))), -torch.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _why_not(best: float, row: int) -> str:
    if best == -torch.inf:
        return f"row {row} has no token that may come next; the constraint and the vocabulary do not fit together"
    return f"row {row} of the logits holds {best}; the model's weights or its cache are broken"

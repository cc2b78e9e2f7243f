"""Small sums over rows of scores, each in a fixed order, whatever other rows there are.

Scores are float64 [R, V], -inf where a token is out, with a maximum of 0 in each row; so `exp` gives weights of which
the largest is 1, and probabilities are weights over their total.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shifted(scores: Tensor) -> Tensor:
    """[R, V] scores with a maximum of 0 in each row."""
    return scores - scores.amax(dim=-1, keepdim=True)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """[R, 1] float64, a number for each row."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def total(weights: Tensor) -> Tensor:
    """[R, 1] sums. A running sum, since that adds one after the other; `sum` promises no order."""
    return weights.cumsum(dim=-1)[:, -1:]


def entropy(scores: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """[R, 1] entropy in nats of the probabilities `weights` / `mass`, `weights` being `scores.exp()`."""
    mean = total(torch.where(weights > 0, weights * scores, 0.0)) / mass
    return mass.log() - mean


def drop(scores: Tensor, out: Tensor) -> Tensor:
    """Scores with -inf where `out`, [R, V] bool."""
    return scores.masked_fill(out, -torch.inf)


def keep_most_likely(scores: Tensor, weights: Tensor, least: Tensor, n_kept: Tensor) -> Tensor:
    """Keep the `n_kept` [R, 1] most likely tokens, `least` [R, 1] being the weight of the last of them.

    Of those as likely as the last one kept, the lowest ids stay.
    """
    above, equal = weights > least, weights == least
    n_equal = n_kept - above.sum(dim=-1, keepdim=True)
    return drop(scores, ~(above | (equal & (equal.cumsum(dim=-1) <= n_equal))))

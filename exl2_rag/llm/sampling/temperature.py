"""Stages that bend the distribution: temperature, dynamic temperature, smoothing. See `scores.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exl2_rag.llm.sampling.params import SamplingParams
from exl2_rag.llm.sampling.scores import column, entropy, total

COLDEST = 1e-10  # dynamic temperature may come out as 0, which is greedy


def temperature(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Divide by each row's temperature, the dynamic one if it has that."""
    degrees = column([one.temperature for one in params], scores)
    if any(one.max_temp > 0 for one in params):
        is_dynamic = torch.tensor([one.max_temp > 0 for one in params], device=scores.device)[:, None]
        degrees = torch.where(is_dynamic, _dynamic(scores, params), degrees)
    return scores / degrees


def _dynamic(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[R, 1] temperatures by the entropy as a share of that of equal probabilities of the tokens still in.

    Source: "dynamic temperature" of koboldcpp; normalised by the tokens left, as in ExLlamaV2.
    """
    weights = scores.exp()
    largest = scores.isfinite().sum(dim=-1, keepdim=True).double().log()
    share = torch.where(largest > 0, entropy(scores, weights, total(weights)) / largest, 0.0).clamp(0, 1)
    low = column([one.min_temp for one in params], scores)
    high = column([one.max_temp for one in params], scores)
    exponent = column([one.temp_exponent for one in params], scores)
    return (low + (high - low) * share**exponent).clamp(min=COLDEST)


def smoothing(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Bend scores x to -factor * (k x^2 - s x^3), with k = (3 - curve) / 2 and s = (curve - 1) / 2.

    Source: quadratic and cubic sampling by kalomaze, as in text-generation-webui.
    """
    factor = column([one.smoothing_factor for one in params], scores)
    curve = column([one.smoothing_curve for one in params], scores)
    known = torch.where(scores.isfinite(), scores, 0.0)
    bent = -factor * (known**2 * (3 - curve) / 2 - known**3 * (curve - 1) / 2)
    return torch.where(scores.isfinite(), bent, scores)

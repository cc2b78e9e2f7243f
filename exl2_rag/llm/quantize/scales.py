"""Finds the scales of EXL2 groups: the ones that round a group's weights with the smallest error.

A group has one float16 multiplier and a 4-bit scale per column, which enters squared. Two ways to find them:

`search_scales` is the one published with ExLlamaV2: the largest weight of each column fixes its 4-bit scale; one factor
p for the whole group, tried on a grid, trades clipped peaks for finer steps.

`search_scales_weighted` looks for the step that suits each column best, given what an error costs in each row, and then
for the multiplier whose 4-bit scales come nearest to these steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.llm.kernels.quantise_ops import rounding_costs
from exl2_rag.llm.kernels.reference import exl2_group_scales

P_STEPS = 97
_P_FIRST, _P_LAST = 0.70, 1.20

_CLIPS = 24  # steps tried for a column, as shares of the one that just holds its largest weight
_CLIP_FIRST, _CLIP_LAST = 0.40, 1.06
_SHARES = 14  # multipliers tried for a group, as shares of the one that just reaches its largest step
_SHARE_FIRST, _SHARE_LAST = 0.45, 1.10
_FINE_SHARES = 11  # tried between the neighbours of the best of them
_REACH = (-1, 0, 1)  # 4-bit scales tried around the nearest


@dataclass(frozen=True, slots=True)
class GroupScales:
    """Scales of one group.

    Attributes:
        scale: [N] int32, 1 to 16.
        scale_max: [] float16, as stored.
        column_scale: [N] float32, the step of each column exactly as a reader computes it.
        p_index: the winning multiplier of the grid.
    """

    scale: Tensor
    scale_max: Tensor
    column_scale: Tensor
    p_index: int


def search_scales(group: Tensor, bits: int) -> GroupScales:
    """Scales for a group of weights [rows, N] float32, as ExLlamaV2's converter chooses them."""
    base = _largest_step(group, bits)
    largest = base.amax()
    scale = torch.round(torch.sqrt(base / largest) * 16).clamp(1, 16)
    factors = torch.tensor([_P_FIRST + (_P_LAST - _P_FIRST) * index / (P_STEPS - 1) for index in range(P_STEPS)])
    steps = ((scale / 16).square() * largest)[None] * factors.to(group)[:, None]
    # Errors to the power 3.5: large ones hurt more than their square.
    p_index = int(rounding_costs(group, None, steps, bits).sum(1, dtype=torch.float64).argmin())
    return _scales(scale, (largest * factors[p_index].to(group)).to(torch.float16), p_index)


def search_scales_weighted(group: Tensor, row_weights: Tensor, bits: int) -> GroupScales:
    """Scales that make the weighted square of the error small, each column's 4-bit scale chosen for itself.

    Args:
        group: [rows, N] float32, the weights.
        row_weights: [rows] float32, what the square of an error in each row costs.
        bits: width of their codes.
    """
    base = _largest_step(group, bits)
    clips = torch.linspace(_CLIP_FIRST, _CLIP_LAST, _CLIPS, device=group.device)
    steps = base[None] * clips[:, None]
    wanted = steps.gather(0, rounding_costs(group, row_weights, steps, bits).argmin(0, keepdim=True))[0]
    largest = wanted.amax()
    coarse = torch.linspace(_SHARE_FIRST, _SHARE_LAST, _SHARES, device=group.device)
    first = _best_multiplier(group, row_weights, wanted, largest * coarse, bits)
    reach = (_SHARE_LAST - _SHARE_FIRST) / (_SHARES - 1)
    fine = torch.linspace(-reach, reach, _FINE_SHARES, device=group.device)
    return _best_multiplier(group, row_weights, wanted, first.scale_max.to(torch.float32) + largest * fine, bits)


def _best_multiplier(group: Tensor, row_weights: Tensor, wanted: Tensor, multipliers: Tensor, bits: int) -> GroupScales:
    """The best of some multipliers [S], with the 4-bit scales that come nearest to the wanted steps [N]."""
    halves = multipliers.clamp(min=0).to(torch.float16)
    group_scales = exl2_group_scales(halves, 1.0).to(torch.float32)[:, None]
    nearest = torch.sqrt(wanted[None] / group_scales.clamp(min=1e-30)).round()
    tried = torch.stack([(nearest + offset).clamp(1, 16) for offset in _REACH], 1)  # [S, reach, N]
    columns = _column_steps(tried, group_scales[:, None])
    costs = rounding_costs(group, row_weights, columns.flatten(0, 1), bits).view(tried.shape)
    least, place = costs.min(1)
    best = int(least.sum(1, dtype=torch.float64).argmin())
    scale = tried[best].gather(0, place[best][None])[0]
    return _scales(scale, halves[best], best)


def round_to_codes(weights: Tensor, column_scale: Tensor, bits: int) -> Tensor:
    """Nearest codes, 0 to 2**bits - 1, int32. Where a step is 0 every code means 0, and the middle one is taken.

    Args:
        weights: [..., rows, N] float32. column_scale: [..., N] float32.
    """
    zero = 1 << (bits - 1)
    step = column_scale[..., None, :]
    quotient = torch.where(step == 0, 0.0, weights / torch.where(step == 0, 1.0, step))
    return (torch.round(quotient) + zero).clamp(0, 2 * zero - 1).to(torch.int32)


def _largest_step(group: Tensor, bits: int) -> Tensor:
    """[N]: the step at which each column's largest weight just fits."""
    step: Tensor = (group.abs().amax(0) + 1e-12) / ((2**bits - 1) / 2)
    return step


def _column_steps(scale: Tensor, group_scale: Tensor) -> Tensor:
    """Steps as a reader computes them, in float32, from 4-bit scales and the group's scale."""
    steps: Tensor = scale.square() * group_scale
    return steps.to(torch.float16).to(torch.float32)


def _scales(scale: Tensor, scale_max: Tensor, p_index: int) -> GroupScales:
    group_scale = exl2_group_scales(scale_max[None], 1.0).to(torch.float32)
    return GroupScales(scale.to(torch.int32), scale_max, _column_steps(scale, group_scale), p_index)

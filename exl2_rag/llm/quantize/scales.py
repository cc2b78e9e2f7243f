"""Finds the scales of EXL2 groups: the ones that round a group's weights with the smallest error.

A group has one float16 multiplier and a 4-bit scale per column, which enters squared. The largest weight of each
column fixes its 4-bit scale; one factor p for the whole group, tried on a grid, trades clipped peaks for finer steps.

Source: the scale search published with ExLlamaV2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.llm.kernels.reference import exl2_group_scales

P_STEPS = 97
_P_FIRST, _P_LAST = 0.70, 1.20


@dataclass(frozen=True, slots=True)
class GroupScales:
    """Scales of a stack of M groups of one shape.

    Attributes:
        scale: [M, N] int32, 1 to 16.
        scale_max: [M] float16, as stored.
        column_scale: [M, N] float32, the step of each column exactly as a reader computes it.
        p_index: [M] int64, the winning step of the grid.
    """

    scale: Tensor
    scale_max: Tensor
    column_scale: Tensor
    p_index: Tensor


def search_scales(groups: Tensor, bits: int) -> GroupScales:
    """Scales for M groups at once.

    Args:
        groups: [M, rows, N] float32, the weights.
        bits: width of their codes.
    """
    zero = 1 << (bits - 1)
    column_max = groups.abs().amax(1) + 1e-12
    base = column_max / ((2 * zero - 1) / 2)
    largest = base.amax(1, keepdim=True)
    scale = torch.round(torch.sqrt(base / largest) * 16).clamp(1, 16)
    step = (scale / 16).square() * largest
    errors = torch.empty((P_STEPS, groups.shape[0]), dtype=torch.float64)
    factors = [_P_FIRST + (_P_LAST - _P_FIRST) * index / (P_STEPS - 1) for index in range(P_STEPS)]
    for index, factor in enumerate(factors):
        scaled = (step * factor)[:, None, :]
        error = torch.round(groups / scaled).clamp_(-zero, zero - 1).mul_(scaled).sub_(groups).abs_()
        # error ** 3.5, many times faster than a general power. More than 2: large errors hurt more than their square.
        errors[index] = error.sqrt().mul_(error).mul_(error).mul_(error).sum((1, 2), dtype=torch.float64)
    p_index = errors.argmin(0)
    best = torch.tensor(factors, dtype=torch.float32)[p_index]
    scale_max = (largest[:, 0] * best).to(torch.float16)
    group_scale = exl2_group_scales(scale_max, 1.0).to(torch.float32)
    column_scale = (scale.square() * group_scale[:, None]).to(torch.float16).to(torch.float32)
    return GroupScales(scale.to(torch.int32), scale_max, column_scale, p_index)


def round_to_codes(weights: Tensor, column_scale: Tensor, bits: int) -> Tensor:
    """Nearest codes, 0 to 2**bits - 1, int32. Where a step is 0 every code means 0, and the middle one is taken.

    Args:
        weights: [..., rows, N] float32. column_scale: [..., N] float32.
    """
    zero = 1 << (bits - 1)
    step = column_scale[..., None, :]
    quotient = torch.where(step == 0, 0.0, weights / torch.where(step == 0, 1.0, step))
    return (torch.round(quotient) + zero).clamp(0, 2 * zero - 1).to(torch.int32)

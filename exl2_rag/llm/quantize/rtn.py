"""Rounds one matrix to the nearest points of the EXL2 grid: no calibration, inputs in their own order.

Also the arithmetic of sizes: which groups a matrix gets for given widths, what they take on disk, and which widths
reach a wanted number of bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.errors import SettingsError
from exl2_rag.llm.checkpoint.exl2_format import pack
from exl2_rag.llm.kernels.weights import CHUNK_ROWS, EXL2_WIDTHS, TILE_COLUMNS
from exl2_rag.llm.quantize.scales import round_to_codes, search_scales

GROUP_SIZES = (32, 64, 128)
"""Rows of a group that `plan_for_bits` chooses from."""


@dataclass(frozen=True, slots=True)
class QuantisationPlan:
    """Widths of a matrix from its first row to its last.

    Attributes:
        bits: falling widths.
        proportions: the share of rows of each; they sum to 1.
        group_sizes: rows of a group of each width, multiples of 32.
    """

    bits: tuple[int, ...]
    proportions: tuple[float, ...]
    group_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.bits) == len(self.proportions) == len(self.group_sizes) > 0:
            raise SettingsError(f"bits, proportions and group sizes must be equally many, they are {self}")
        if any(bits not in EXL2_WIDTHS for bits in self.bits):
            raise SettingsError(f"EXL2 knows widths of 2, 3, 4, 5, 6 and 8 bits, not all of {list(self.bits)}")
        if list(self.bits) != sorted(set(self.bits), reverse=True):
            raise SettingsError(f"bit widths must fall from the first to the last, they are {list(self.bits)}")
        if any(size <= 0 or size % CHUNK_ROWS for size in self.group_sizes):
            raise SettingsError(f"group sizes must be multiples of {CHUNK_ROWS}, they are {list(self.group_sizes)}")
        if any(share < 0 for share in self.proportions) or not math.isclose(sum(self.proportions), 1.0):
            raise SettingsError(f"proportions must be shares that sum to 1, they are {list(self.proportions)}")

    def groups(self, in_features: int) -> list[tuple[int, int]]:
        """(bits, rows) of each group: each width's share is rounded up to whole groups, the last group may be short."""
        left = in_features
        counts: list[int] = []
        for share, size in zip(self.proportions, self.group_sizes, strict=True):
            counts.append(max(0, math.ceil(min(in_features * share, left) / size)))
            left -= counts[-1] * size
        if left > 0:  # shares that sum to a hair less than 1
            counts[-1] += math.ceil(left / self.group_sizes[-1])
        groups: list[tuple[int, int]] = []
        rows_left = in_features
        for bits, size, count in zip(self.bits, self.group_sizes, counts, strict=True):
            for _ in range(count):
                rows = min(size, rows_left)
                if rows > 0:
                    groups.append((bits, rows))
                rows_left -= rows
        return groups

    def total_bits(self, in_features: int, out_features: int) -> int:
        """Bits of the matrix on disk, tables included, bias not; `out_features` is the padded width."""
        groups = self.groups(in_features)
        codes = sum(rows * bits for bits, rows in groups) * out_features
        return codes + len(groups) * (16 + 32 + 4 * out_features) + 32 * in_features

    def expected_error(self, in_features: int) -> float:
        """Mean square error to expect, but for a constant: steps halve with each bit, peaks grow with the group."""
        return sum(rows * 4.0**-bits * math.log(rows) for bits, rows in self.groups(in_features)) / in_features


def padded(out_features: int) -> int:
    """The stored width of a matrix: the next multiple of 32."""
    return -(-out_features // TILE_COLUMNS) * TILE_COLUMNS


def _candidates(in_features: int) -> Iterator[QuantisationPlan]:
    """Every width alone, and every pair of neighbours in every split, for each group size."""
    for size in GROUP_SIZES:
        for bits in EXL2_WIDTHS:
            yield QuantisationPlan((bits,), (1.0,), (size,))
        for low, high in itertools.pairwise(EXL2_WIDTHS):
            for rows in range(size, in_features, size):
                share = rows / in_features
                yield QuantisationPlan((high, low), (share, 1 - share), (size, size))


def plan_for_bits(bits: float, in_features: int, out_features: int) -> QuantisationPlan:
    """The plan of least expected error that takes at most `bits` per weight on disk, scales and tables included.

    Raises:
        SettingsError: not even 2-bit codes fit.
    """
    width = padded(out_features)
    affordable = [
        plan for plan in _candidates(in_features) if plan.total_bits(in_features, width) <= bits * in_features * width
    ]
    if not affordable:
        least = min(plan.total_bits(in_features, width) for plan in _candidates(in_features))
        raise SettingsError(
            f"{bits} bits per weight are too few for a {in_features} x {out_features} matrix; with its tables it takes "
            f"at least {least / (in_features * width):.2f}"
        )
    return min(affordable, key=lambda plan: plan.expected_error(in_features))


def quantize_linear_rtn(
    weight: Tensor,
    *,
    bits: int | Sequence[int] = 4,
    group_size: int | Sequence[int] = 128,
    proportions: Sequence[float] = (1.0,),
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """The EXL2 tensors of one linear layer, each weight rounded to the nearest point of the grid.

    Args:
        weight: [out, in], any floating type; `in` a multiple of 32. `out` is padded to a multiple of 32 with zeros.
        bits: one width, or falling widths for the first rows to the last.
        group_size: rows of a group, one number or one per width.
        proportions: share of rows of each width.
        bias: [out]; padded and stored beside the rest.

    Returns:
        `q_weight`, `q_groups`, `q_scale`, `q_scale_max`, `q_invperm` and, if given, `bias`.

    Raises:
        SettingsError: widths, sizes or shares that the format cannot hold, or a weight that is not finite.
    """
    widths = (bits,) if isinstance(bits, int) else tuple(bits)
    sizes = (group_size,) * len(widths) if isinstance(group_size, int) else tuple(group_size)
    plan = QuantisationPlan(widths, tuple(proportions), sizes)
    out_features, in_features = weight.shape
    if in_features == 0 or in_features % CHUNK_ROWS:
        raise SettingsError(f"EXL2 needs a multiple of 32 input features, the weight has {in_features}")
    rows = weight.detach().to(torch.float32).T
    if not bool(torch.isfinite(rows).all()):
        raise SettingsError("the weight holds numbers that are not finite; it cannot be quantised")
    stored = torch.zeros((in_features, padded(out_features)), dtype=torch.float32)
    stored[:, :out_features] = rows
    groups = plan.groups(in_features)
    codes, scales, scale_max = _round_groups(stored, groups)
    parts = pack(codes, scales, scale_max, groups)
    if bias is not None:
        parts["bias"] = torch.zeros(stored.shape[1], dtype=torch.float16)
        parts["bias"][:out_features] = bias.detach().to(torch.float16)
    return parts


def _round_groups(stored: Tensor, groups: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [K, N], scales [G, N] and scale_max [G]."""
    codes: list[Tensor] = []
    scales: list[Tensor] = []
    scale_max: list[Tensor] = []
    first = 0
    for bits, rows in groups:
        group = stored[first : first + rows]
        found = search_scales(group, bits)
        codes.append(round_to_codes(group, found.column_scale, bits))
        scales.append(found.scale)
        scale_max.append(found.scale_max)
        first += rows
    return torch.cat(codes), torch.stack(scales), torch.stack(scale_max)

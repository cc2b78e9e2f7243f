"""The quantised matrices that ops multiply by, in the form they have in memory. Knows nothing of files.

Both kinds keep their codes packed. Columns are cut into tiles of 32, and all rows of a tile lie together, so that
a product walks memory from front to back; `exl2_layout.h` draws the layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_COLUMNS = 32
"""Columns of a tile. Every quantised matrix is a whole number of tiles wide."""

CHUNK_ROWS = 32
"""Rows that are decoded together; b bits wide they fill exactly b words of a column."""

EXL2_WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits a code may have."""


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive stored rows of one bit width that share a row of scales."""

    bits: int
    first_packed_row: int
    rows: int


def parse_groups(pairs: Sequence[int], packed_rows: int) -> list[Group]:
    """The groups that a `q_groups` table describes.

    Args:
        pairs: (bits, first packed row) of each group, laid end to end, as in the file.
        packed_rows: rows of `q_weight`; where the last group ends.

    Raises:
        ValueError: the table cannot be true; the message says in which way, without naming a layer.
    """
    if len(pairs) == 0 or len(pairs) % 2:
        raise ValueError(f"q_groups must hold one (bits, first row) pair per group, it holds {len(pairs)} numbers")
    widths, starts = pairs[0::2], [*pairs[1::2], packed_rows]
    if starts[0] != 0:
        raise ValueError(f"the first group starts at packed row {starts[0]} instead of 0")
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        if end <= start:
            where = f"group {index + 1} at {end}" if index + 1 < len(widths) else f"q_weight has {end} rows"
            raise ValueError(f"group {index} starts at packed row {start}, but {where}: groups overlap")
    groups: list[Group] = []
    for index, (bits, start, end) in enumerate(zip(widths, starts, starts[1:], strict=False)):
        if bits not in EXL2_WIDTHS:
            raise ValueError(f"group {index} has codes of {bits} bits; EXL2 knows 2, 3, 4, 5, 6 and 8")
        if (end - start) % bits:
            raise ValueError(
                f"group {index} has {end - start} packed rows of {bits} bits, which is no multiple of {CHUNK_ROWS} rows"
            )
        if groups and bits > groups[-1].bits:
            raise ValueError(f"bit widths must not rise along the groups: {bits} follows {groups[-1].bits}")
        groups.append(Group(bits, start, (end - start) * CHUNK_ROWS // bits))
    return groups


@dataclass(frozen=True, slots=True)
class Exl2Weights:
    """A K x N matrix of 2 to 8 bits a weight, N a multiple of 32. Made by `ops.exl2_prepare`.

    Attributes:
        codes: [N/32, R, 32] int32, R packed rows of each tile of columns.
        scales: [N/32, G, 4] int32, a nibble (scale - 1) per group and column of the tile.
        group_scales: [G] float16, the multiplier of each group, prescale and the division by 256 included.
        groups: [G, 2] int32, (bits, rows) of each group.
        perm: [K] int32, the input feature that each stored row belongs to; empty if that is the row itself.
    """

    codes: Tensor
    scales: Tensor
    group_scales: Tensor
    groups: Tensor
    perm: Tensor
    in_features: int
    out_features: int

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.group_scales, self.groups, self.perm))


@dataclass(frozen=True, slots=True)
class GptqWeights:
    """A K x N matrix of 4-bit codes with zero points, N a multiple of 32. Made by `ops.gptq_prepare`.

    Attributes:
        codes: [N/32, K/8, 32] int32, eight rows to a word.
        scales: [N/32, G, 32] float16, prescale included.
        zeros: [N/32, G, 32] uint8, the zero point that is subtracted, 0 to 16.
        row_groups: [K] int32, the group of each row.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    row_groups: Tensor
    in_features: int
    out_features: int

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros, self.row_groups))


@dataclass(frozen=True, slots=True)
class PlaneWeights:
    """A K x N matrix for products of whole numbers (the precision "fast"), N a multiple of 32.

    The layout is drawn in `exl2_layout.h`. Made by `ops.exl2_prepare_planes` and `ops.gptq_prepare_planes`.

    Attributes:
        planes: [N/32, R, 128] uint8, the codes: as many bytes as in the file.
        scales: EXL2: [N/32, G, 16] uint8, a nibble (scale - 1) per group and column. GPTQ: [N/32, G, 32] float16.
        group_scales: EXL2: [G] float16, as in `Exl2Weights`. GPTQ: empty.
        zeros: GPTQ: [N/32, G, 32] uint8, the zero points. EXL2: empty.
        groups: [G, 2] int32, (bits, rows) of each group.
        perm: [K] int32, the input feature that each stored row belongs to; empty if that is the row itself.
    """

    planes: Tensor
    scales: Tensor
    group_scales: Tensor
    zeros: Tensor
    groups: Tensor
    perm: Tensor
    in_features: int
    out_features: int

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        parts = (self.planes, self.scales, self.group_scales, self.zeros, self.groups, self.perm)
        return sum(part.nbytes for part in parts)


FEW_ROWS = 16
"""Rows that are multiplied by codes as they lie in memory, four at a time; for more, codes are spread out first."""

WHOLE_ORDER = tuple(4 * (i % 16 // 2) + i % 2 + 2 * (i // 16) for i in range(CHUNK_ROWS))
"""Stored rows of a chunk as many tokens have them: the first two of each four, then the last two."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Activations as whole numbers of 15 bits, 32 stored rows to a scale. Made by `ops.digits`.

    Up to `FEW_ROWS` tokens have two digits of each number:

        x[t, 32 * c + i] is about scales[t, c] * (128 * digits[t, c, i] + digits[t, c, 32 + i])

    More tokens have the numbers themselves, those of a chunk in `WHOLE_ORDER`:

        x[t, 32 * c + WHOLE_ORDER[i]] is about scales[c, t] * digits[c, t, i]

    Attributes:
        digits: [T, K/32, 64] int8, 32 high digits and then 32 low ones; or [K/32, T, 32] int16.
        scales: [T, K/32] or [K/32, T] float32.
        sums: [T, K/32] int32, the sum of a chunk's numbers; or [K/32, T] int32, the sum over i < 16 of the products of
            numbers i and 16 + i, modulo 2^32.
    """

    digits: Tensor
    scales: Tensor
    sums: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether these are numbers, not digits."""
        return self.digits.dtype == torch.int16

    @property
    def n_rows(self) -> int:
        """T."""
        return self.digits.shape[1 if self.is_whole else 0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.digits.shape[0 if self.is_whole else 1] * CHUNK_ROWS

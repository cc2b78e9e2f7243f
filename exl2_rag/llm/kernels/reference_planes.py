"""The ops of the precision "fast" in plain torch; what `reference.py` is to the others."""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.errors import ShapeError
from exl2_rag.llm.kernels import codes as bit_codes
from exl2_rag.llm.kernels.weights import CHUNK_ROWS, FEW_ROWS, TILE_COLUMNS, WHOLE_ORDER, Digits, Group, PlaneWeights

LARGEST_NUMBER = 127 * 128
"""Activations become whole numbers from minus this to this."""

_SMALLEST_MAXIMUM = 2.0**-100
_MAX_DECODED = 1 << 21  # weights decoded at a time


def plane_bits(bits: int) -> tuple[int, int]:
    """Widths of the low and the high plane of codes of `bits` bits; the high one may be 0."""
    low = 8 if bits == 8 else 4 if bits >= 4 else 2
    return low, bits - low


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes of one width as planes.

    Args:
        codes: [C * 32, N] int32, values 0 to 2**bits - 1, N a multiple of 32.

    Returns:
        [N/32, C * bits, 128] uint8.
    """
    n_tiles = codes.shape[1] // TILE_COLUMNS
    # [tile, chunk, quad, byte of the unit], a byte being one of four rows of one of 32 columns
    quads = codes.reshape(-1, 8, 4, n_tiles, TILE_COLUMNS).permute(3, 0, 1, 4, 2).flatten(3)
    units = []
    shift = 0
    for width in plane_bits(bits):
        if width:
            part = (quads >> shift) & ((1 << width) - 1)
            places = torch.arange(0, 8, width, dtype=torch.int32, device=codes.device)[:, None]
            units.append(
                (part.reshape(*part.shape[:2], width, 8 // width, part.shape[3]) << places).sum(3, dtype=torch.int32)
            )
            shift += width
    return torch.cat(units, dim=2).to(torch.uint8).flatten(1, 2)


def unpack_planes(planes: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_planes`: [n, C * bits, 128] uint8 to [C * 32, n * 32] int32."""
    n_tiles = planes.shape[0]
    units = planes.to(torch.int32).reshape(n_tiles, -1, bits, 128)
    quads = torch.zeros((n_tiles, units.shape[1], 8, 128), dtype=torch.int32, device=planes.device)
    first, shift = 0, 0
    for width in plane_bits(bits):
        if width:
            places = torch.arange(0, 8, width, dtype=torch.int32, device=planes.device)[:, None]
            part = (units[:, :, first : first + width, None] >> places) & ((1 << width) - 1)
            quads |= part.flatten(2, 3) << shift
            first, shift = first + width, shift + width
    return quads.reshape(*quads.shape[:3], TILE_COLUMNS, 4).permute(1, 2, 4, 0, 3).flatten(0, 2).flatten(1)


def exl2_planes(q_weight: Tensor, q_scale: Tensor, groups: list[Group]) -> tuple[Tensor, Tensor]:
    """`planes` and `scales` of `PlaneWeights` from the file's `q_weight` [R, N] and `q_scale` [G, N/8]."""
    planes = [
        pack_planes(bit_codes.unpack_codes(q_weight[first : first + rows * bits // CHUNK_ROWS], bits), bits)
        for bits, first, _, rows in bit_codes.width_runs(groups)
    ]
    nibbles = bit_codes.unpack_nibbles(q_scale).reshape(len(groups), -1, 2, TILE_COLUMNS // 2)
    scales = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).to(torch.uint8).transpose(0, 1).contiguous()
    return torch.cat(planes, dim=1), scales


def gptq_planes(qweight: Tensor, perm: Tensor) -> Tensor:
    """`planes` of `PlaneWeights` from the file's `qweight` [K/8, N]; row r takes the codes of row perm[r]."""
    codes = bit_codes.unpack_nibbles(qweight.T).T
    return pack_planes(codes if perm.numel() == 0 else codes[perm.to(torch.int64)], 4)


def digits(x: Tensor, perm: Tensor) -> Digits:
    """x [T, K] as whole numbers, its columns in stored order. Roundings are those of the kernel, to the bit."""
    stored = x if perm.numel() == 0 else x.index_select(1, perm)
    chunks = stored.reshape(x.shape[0], -1, CHUNK_ROWS)
    largest = chunks.abs().amax(-1)
    finite = torch.isfinite(chunks).all(-1)
    used = finite & (largest >= _SMALLEST_MAXIMUM)
    # A number divided by a tensor would be a reciprocal and a product, rounded twice.
    factors = torch.where(used, torch.full_like(largest, LARGEST_NUMBER) / largest, 0.0)
    numbers = torch.where(used[..., None], chunks * factors[..., None], 0.0).round().to(torch.int32)
    scales = torch.where(used, largest / LARGEST_NUMBER, torch.where(finite, 0.0, float("nan")))
    if x.shape[0] > FEW_ROWS:
        whole = numbers.transpose(0, 1)[..., WHOLE_ORDER]
        halves = whole.to(torch.int64).reshape(*whole.shape[:-1], 2, -1)
        products = (halves[..., 0, :] * halves[..., 1, :]).sum(-1)
        # As a number of 32 bits, which wraps around.
        wrapped = (products + (1 << 31)) % (1 << 32) - (1 << 31)
        return Digits(whole.to(torch.int16).contiguous(), scales.T.contiguous(), wrapped.to(torch.int32))
    high = (numbers + 64) >> 7
    two = torch.cat((high, numbers - (high << 7)), dim=-1).to(torch.int8)
    return Digits(two, scales, numbers.sum(-1, dtype=torch.int32))


def numbers_of(x: Digits) -> Tensor:
    """The whole numbers [T, K/32, 32] int32, rows in stored order."""
    if not x.is_whole:
        return x.digits[..., :CHUNK_ROWS].to(torch.int32) * 128 + x.digits[..., CHUNK_ROWS:]
    numbers = torch.empty_like(x.digits, dtype=torch.int32)
    numbers[..., WHOLE_ORDER] = x.digits.to(torch.int32)
    return numbers.transpose(0, 1)


def plane_column_scales(weights: PlaneWeights, first: int, last: int) -> Tensor:
    """[G, columns] float32: what the codes of a group are multiplied by, in the tiles first to last."""
    scales = weights.scales[first:last]
    if weights.zeros.numel():
        return scales.transpose(0, 1).flatten(1).to(torch.float32)
    nibbles = torch.cat((scales & 15, scales >> 4), dim=-1).transpose(0, 1).flatten(1)
    squares = (nibbles.to(torch.float32) + 1).square()
    return (squares * weights.group_scales.to(torch.float32)[:, None]).to(torch.float16).to(torch.float32)


def plane_codes(weights: PlaneWeights, first: int, last: int) -> Tensor:
    """[K, columns] int32: the codes of the tiles first to last, rows in stored order, zero point subtracted."""
    parts: list[Tensor] = []
    packed = 0
    for index, (bits, rows) in enumerate(weights.groups.tolist()):
        packed_rows = rows * bits // CHUNK_ROWS
        codes = unpack_planes(weights.planes[first:last, packed : packed + packed_rows], bits)
        if weights.zeros.numel():
            parts.append(codes - weights.zeros[first:last, index].flatten().to(torch.int32))
        else:
            parts.append(codes - (1 << (bits - 1)))
        packed += packed_rows
    return torch.cat(parts)


def plane_matmul(x: Digits, weights: PlaneWeights, *, width: int | None = None, bias: Tensor | None = None) -> Tensor:
    """The product of what `x` stands for and the matrix, decoded a few tiles at a time."""
    if x.in_features != weights.in_features:
        raise ShapeError(f"plane_matmul: x must have {weights.in_features} columns, it has {x.in_features}")
    scales_of_rows = x.scales.T if x.is_whole else x.scales
    stored = (numbers_of(x).double() * scales_of_rows.double()[..., None]).flatten(1)
    rows_of_group = weights.groups[:, 1].to(torch.int64)
    step = max(1, _MAX_DECODED // (weights.in_features * TILE_COLUMNS))
    parts = []
    for first in range(0, weights.planes.shape[0], step):
        scales = plane_column_scales(weights, first, first + step).double().repeat_interleave(rows_of_group, dim=0)
        parts.append(stored @ (plane_codes(weights, first, first + step).double() * scales))
    result = torch.cat(parts, dim=1)[:, : weights.out_features if width is None else width]
    return (result if bias is None else result + bias.double()).to(torch.float32)

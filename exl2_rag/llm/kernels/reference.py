"""Every op of `ops.py` in plain torch: what the native kernels are tested against, and the fallback without them.

Sums run in float64 and are rounded once, so these are the more exact side of every comparison, and a row's result
depends neither on the other rows nor on how many there are. Slow on purpose of being plain. Arguments are as in
`ops.py`; whoever calls directly has checked them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.llm.kernels import checks
from exl2_rag.llm.kernels import codes as bit_codes
from exl2_rag.llm.kernels.reference_attention import check_batch as check_batch  # noqa: PLC0414
from exl2_rag.llm.kernels.reference_attention import check_range, rotate_half
from exl2_rag.llm.kernels.reference_attention import paged_attention as paged_attention  # noqa: PLC0414
from exl2_rag.llm.kernels.reference_attention import quantise_kv_write as quantise_kv_write  # noqa: PLC0414
from exl2_rag.llm.kernels.reference_sampling import sample as sample  # noqa: PLC0414
from exl2_rag.llm.kernels.weights import TILE_COLUMNS, Exl2Weights, GptqWeights, Group

_MAX_DECODED = 1 << 22  # weights decoded at a time: 16 MiB of float32, never the whole matrix of a large layer


def _tiles(matrix: Tensor, tile_columns: int) -> Tensor:
    """[R, N] to [N / tile_columns, R, tile_columns], in memory of its own even where nothing moves."""
    tiles = matrix.reshape(matrix.shape[0], -1, tile_columns).transpose(0, 1)
    return tiles.clone(memory_format=torch.contiguous_format)


def _untile(tiles: Tensor) -> Tensor:
    """[tiles, R, c] to [R, tiles * c]."""
    return tiles.transpose(0, 1).flatten(1)


def exl2_prepare(
    q_weight: Tensor,
    q_groups: Tensor,
    q_scale: Tensor,
    q_scale_max: Tensor,
    q_invperm: Tensor,
    *,
    prescale: float = 1.0,
) -> Exl2Weights:
    """Repack a matrix from its form in the file to its form in memory."""
    groups, in_features = checks.exl2_groups("exl2_prepare", q_weight, q_groups, q_scale, q_invperm)
    out_features = q_weight.shape[1]
    return Exl2Weights(
        codes=_tiles(q_weight, TILE_COLUMNS),
        scales=_tiles(q_scale, TILE_COLUMNS // 8),
        group_scales=exl2_group_scales(q_scale_max, prescale),
        groups=torch.tensor([[g.bits, g.rows] for g in groups], dtype=torch.int32, device=q_weight.device),
        perm=exl2_perm(q_invperm),
        in_features=in_features,
        out_features=out_features,
    )


def exl2_perm(q_invperm: Tensor) -> Tensor:
    """[K] int32: the input feature of each stored row; empty if that is the row itself."""
    perm = torch.argsort(q_invperm.to(torch.int64) & 0xFFFF).to(torch.int32)
    if torch.equal(perm, torch.arange(perm.shape[0], dtype=torch.int32, device=perm.device)):
        return perm[:0].clone()
    return perm


def exl2_group_scales(q_scale_max: Tensor, prescale: float) -> Tensor:
    """[G] float16: prescale and the division by 256, rounded once to float16, which often makes them subnormal."""
    factor = torch.tensor(prescale / 256, dtype=torch.float32, device=q_scale_max.device)
    return (q_scale_max.to(torch.float32) * factor).to(torch.float16)


def _groups_of(weights: Exl2Weights) -> list[Group]:
    groups: list[Group] = []
    first = 0
    for bits, rows in weights.groups.tolist():
        groups.append(Group(bits, first, rows))
        first += rows * bits // 32
    return groups


def _exl2_decode(weights: Exl2Weights, groups: list[Group], first: int, last: int) -> Tensor:
    """[K, columns] float16 of the tiles first to last, rows in stored order."""
    return bit_codes.dequantise(
        _untile(weights.codes[first:last]), _untile(weights.scales[first:last]), weights.group_scales, groups
    )


def exl2_matmul(x: Tensor, weights: Exl2Weights) -> Tensor:
    """x [T, K] times the matrix, decoded a few tiles at a time."""
    stored_x = x if weights.perm.numel() == 0 else x.index_select(1, weights.perm)
    groups = _groups_of(weights)
    step = max(1, _MAX_DECODED // (weights.in_features * TILE_COLUMNS))
    parts = [
        stored_x.double() @ _exl2_decode(weights, groups, first, first + step).double()
        for first in range(0, weights.codes.shape[0], step)
    ]
    return torch.cat(parts, dim=1).to(torch.float32)


def gptq_prepare(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    prescale: float = 1.0,
    zero_offset: int = 1,
) -> GptqWeights:
    """Repack a 4-bit GPTQ matrix from its form in the file to its form in memory."""
    in_features, out_features = qweight.shape[0] * 8, qweight.shape[1]
    tiled_scales, tiled_zeros = gptq_tables(qzeros, scales, prescale=prescale, zero_offset=zero_offset)
    return GptqWeights(
        codes=_tiles(qweight, TILE_COLUMNS),
        scales=tiled_scales,
        zeros=tiled_zeros,
        row_groups=gptq_row_groups(g_idx, in_features, scales.shape[0]).to(qweight.device),
        in_features=in_features,
        out_features=out_features,
    )


def gptq_tables(qzeros: Tensor, scales: Tensor, *, prescale: float, zero_offset: int) -> tuple[Tensor, Tensor]:
    """Scales [N/32, G, 32] float16 and zero points [N/32, G, 32] uint8."""
    half_scales = scales.to(torch.float16)
    if prescale != 1.0:
        half_scales = (half_scales.to(torch.float32) * prescale).to(torch.float16)
    zeros = (bit_codes.unpack_nibbles(qzeros) + zero_offset).to(torch.uint8)
    return _tiles(half_scales, TILE_COLUMNS), _tiles(zeros, TILE_COLUMNS)


def gptq_row_groups(g_idx: Tensor | None, in_features: int, n_groups: int) -> Tensor:
    """[K] int32, the group of each row; without a table the group size is the smallest power of two that suffices."""
    if g_idx is not None and bool((g_idx != 0).any()):
        return g_idx.to(torch.int32).clone()
    group_size = 1
    while group_size * n_groups < in_features:
        group_size *= 2
    return torch.arange(in_features, dtype=torch.int32) // group_size


def gptq_decode(weights: GptqWeights, first: int, last: int) -> Tensor:
    """[K, columns] float16 of the tiles first to last."""
    rows = weights.row_groups.to(torch.int64)
    codes = bit_codes.unpack_nibbles(_untile(weights.codes[first:last]).T).T
    zeros = _untile(weights.zeros[first:last]).to(torch.int32)[rows]
    scales = _untile(weights.scales[first:last]).to(torch.float32)[rows]
    return ((codes - zeros).to(torch.float32) * scales).to(torch.float16)


def gptq_matmul(x: Tensor, weights: GptqWeights) -> Tensor:
    """x [T, K] times the matrix, decoded a few tiles at a time."""
    step = max(1, _MAX_DECODED // (weights.in_features * TILE_COLUMNS))
    parts = [
        x.double() @ gptq_decode(weights, first, first + step).double()
        for first in range(0, weights.codes.shape[0], step)
    ]
    return torch.cat(parts, dim=1).to(torch.float32)


def dense_matmul(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed."""
    step = max(1, _MAX_DECODED // max(1, weight.shape[1]))
    parts = [x.double() @ weight[first : first + step].double().T for first in range(0, max(1, weight.shape[0]), step)]
    product = torch.cat(parts, dim=1)
    return (product if bias is None else product + bias.double()).to(torch.float32)


def embedding(table: Tensor, token_ids: Tensor) -> Tensor:
    """The rows of `table` [V, C] that `token_ids` [T] name, in float32."""
    check_range("embedding", "token_ids", token_ids, table.shape[0])
    return table.index_select(0, token_ids).to(torch.float32)


def add_into(y: Tensor, x: Tensor) -> None:
    """y += x."""
    y += x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight, over the last dimension."""
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()).to(torch.float32)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up."""
    wide = gate.double()
    return (wide * torch.sigmoid(wide) * up.double()).to(torch.float32)


def silu_mul_into(gate: Tensor, up: Tensor) -> None:
    """gate *= sigmoid(gate) * up."""
    gate.copy_(silu_mul(gate, up))


def rope_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Tensor:
    """Rotate q and k, write k and v into their pages, return q."""
    check_range("rope_cache_write", "positions", positions, cos.shape[0])
    check_range("rope_cache_write", "slot_mapping", slot_mapping, k_pages.shape[0] * k_pages.shape[1])
    row_cos, row_sin = cos[positions][:, None], sin[positions][:, None]
    page, row = slot_mapping // k_pages.shape[1], slot_mapping % k_pages.shape[1]
    k_pages[page, row] = rotate_half(k, row_cos, row_sin).to(k_pages.dtype)
    v_pages[page, row] = v.to(v_pages.dtype)
    return rotate_half(q, row_cos, row_sin)

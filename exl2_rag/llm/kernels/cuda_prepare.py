"""Repacks EXL2 and GPTQ matrices from their form in the file into `CudaWeights`, once at load.

Done with torch operators on the tensors' own device, in slabs that bound the scratch memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from exl2_rag.errors import ShapeError
from exl2_rag.llm.kernels import codes as bit_codes
from exl2_rag.llm.kernels import reference
from exl2_rag.llm.kernels.checks import check_exl2_parts, check_gptq_parts, exl2_groups
from exl2_rag.llm.kernels.cuda_packing import UNIT_BYTES, pack_chunks
from exl2_rag.llm.kernels.cuda_weights import (
    EXL2_HEADER_UNITS,
    GPTQ_HEADER_UNITS,
    CudaWeights,
    StreamLayout,
    assemble,
)
from exl2_rag.llm.kernels.weights import CHUNK_ROWS, TILE_COLUMNS, Group

MAX_STORED_ROWS: Final = 65504
"""Rows that a matrix may have, padding included: 16-bit numbers name them in the file, and they are whole chunks."""

_SLAB_WEIGHTS = 1 << 24  # weights unpacked at a time: a few hundred MiB of scratch


def exl2_prepare(
    q_weight: Tensor,
    q_groups: Tensor,
    q_scale: Tensor,
    q_scale_max: Tensor,
    q_invperm: Tensor,
    *,
    prescale: float = 1.0,
) -> CudaWeights:
    """Repack a matrix from its form in the file. Arguments as `ops.exl2_prepare`; they are left alone.

    Raises:
        DTypeError, ShapeError: the tensors are not one EXL2 matrix, or it is too large.
    """
    check_exl2_parts("exl2_prepare", q_weight, q_groups, q_scale, q_scale_max, q_invperm)
    _check_columns("exl2_prepare", "q_weight", q_weight)
    groups, in_features = exl2_groups("exl2_prepare", q_weight, q_groups, q_scale, q_invperm)
    out_features = q_weight.shape[1]
    stored_rows = q_invperm.to(torch.int64) & 0xFFFF
    features = torch.argsort(stored_rows)
    identity = torch.arange(in_features, device=q_invperm.device)
    if not torch.equal(stored_rows[features], identity):
        raise ShapeError(f"exl2_prepare: q_invperm must name each of the {in_features} stored rows once")
    if torch.equal(features, identity):
        stored_rows, features = stored_rows[:0], features[:0]

    layout = StreamLayout.of(groups, EXL2_HEADER_UNITS)
    device, n_tiles = q_weight.device, out_features // TILE_COLUMNS
    _check_size("exl2_prepare", layout, n_tiles, in_features)
    stream = torch.empty((n_tiles, layout.length, 4), dtype=torch.int32, device=device)
    headers = torch.tensor(layout.header_units, dtype=torch.int64, device=device)
    stream[:, headers] = q_scale.reshape(len(groups), n_tiles, 4).transpose(0, 1)
    runs = bit_codes.width_runs(groups)
    step = max(1, _SLAB_WEIGHTS // (in_features * TILE_COLUMNS))
    for first in range(0, n_tiles, step):
        columns = slice(first * TILE_COLUMNS, (first + step) * TILE_COLUMNS)
        for bits, first_packed, first_row, rows in runs:
            words = q_weight[first_packed : first_packed + rows * bits // CHUNK_ROWS, columns]
            packed = pack_chunks(bit_codes.unpack_codes(words, bits), bits)
            chunk = first_row // CHUNK_ROWS
            units = layout.chunk_units[chunk : chunk + rows // CHUNK_ROWS]
            index = _unit_index(units, packed.shape[2] // 4, device)
            stream[first : first + step, index] = packed.reshape(packed.shape[0], -1, 4)
    return assemble(
        stream,
        layout,
        layout.table(reference.exl2_group_scales(q_scale_max, prescale)),
        stored_rows.to(torch.int32),
        features.to(torch.int32),
        in_features=in_features,
        has_zero_points=False,
    )


def gptq_prepare(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    prescale: float = 1.0,
    zero_offset: int = 1,
) -> CudaWeights:
    """Repack a 4-bit GPTQ matrix from its form in the file. Arguments as `ops.gptq_prepare`; they are left alone.

    Rows are sorted by group, and each group is padded to whole chunks with weights of zero that no input feature meets.

    Raises:
        DTypeError, ShapeError: the tensors are not one GPTQ matrix, or it is too large.
    """
    check_gptq_parts("gptq_prepare", qweight, qzeros, scales, g_idx)
    _check_columns("gptq_prepare", "qweight", qweight)
    in_features, out_features, device = qweight.shape[0] * 8, qweight.shape[1], qweight.device
    half_scales = scales.to(torch.float16)
    if prescale != 1.0:
        half_scales = (half_scales.to(torch.float32) * prescale).to(torch.float16)
    zeros = bit_codes.unpack_nibbles(qzeros) + zero_offset
    row_groups = reference.gptq_row_groups(g_idx, in_features, scales.shape[0]).to("cpu", torch.int64)

    sizes = torch.bincount(row_groups, minlength=scales.shape[0])
    present = sizes.nonzero().flatten()
    padded = -(-sizes // CHUNK_ROWS) * CHUNK_ROWS
    starts, first_rows = padded.cumsum(0) - padded, sizes.cumsum(0) - sizes
    order = torch.argsort(row_groups, stable=True)  # features, group by group
    sorted_groups = row_groups[order]
    stored = starts[sorted_groups] + torch.arange(in_features) - first_rows[sorted_groups]
    features = torch.full((int(padded.sum()),), -1, dtype=torch.int64)
    features[stored] = order
    stored_rows = torch.empty(in_features, dtype=torch.int64)
    stored_rows[order] = stored
    group_of_row = torch.repeat_interleave(torch.arange(len(padded)), padded)

    groups = [Group(4, 0, int(padded[group])) for group in present.tolist()]
    layout = StreamLayout.of(groups, GPTQ_HEADER_UNITS)
    n_tiles = out_features // TILE_COLUMNS
    _check_size("gptq_prepare", layout, n_tiles, len(features))
    stream = torch.empty((n_tiles, layout.length, 4), dtype=torch.int32, device=device)
    present = present.to(device)
    tile_scales = half_scales[present].reshape(len(groups), n_tiles, TILE_COLUMNS).transpose(0, 1).contiguous()
    tile_zeros = zeros[present].to(torch.uint8).reshape(len(groups), n_tiles, TILE_COLUMNS).transpose(0, 1).contiguous()
    header = torch.cat((tile_scales.view(torch.int32), tile_zeros.view(torch.int32)), dim=2)
    stream[:, _unit_index(layout.header_units, GPTQ_HEADER_UNITS, device)] = header.reshape(n_tiles, -1, 4)

    row_on_device, group_on_device = features.to(device), group_of_row.to(device)
    index = _unit_index(layout.chunk_units, 4 * CHUNK_ROWS * TILE_COLUMNS // 8 // UNIT_BYTES, device)
    step = max(1, _SLAB_WEIGHTS // (len(features) * TILE_COLUMNS))
    for first in range(0, n_tiles, step):
        columns = slice(first * TILE_COLUMNS, (first + step) * TILE_COLUMNS)
        words = qweight[:, columns]
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=device)
        codes = ((words[:, None] >> shifts[None, :, None]) & 15).flatten(0, 1)
        nothing = zeros[group_on_device][:, columns].clamp(max=15)  # a code whose weight is zero
        stored_codes = torch.where(row_on_device[:, None] < 0, nothing, codes[row_on_device.clamp(min=0)])
        packed = pack_chunks(stored_codes.to(torch.int32), 4)
        stream[first : first + step, index] = packed.reshape(packed.shape[0], -1, 4)
    if torch.equal(features, torch.arange(in_features)):
        stored_rows, features = stored_rows[:0], features[:0]
    return assemble(
        stream,
        layout,
        layout.table(None),
        stored_rows.to(device, torch.int32),
        features.to(device, torch.int32),
        in_features=in_features,
        has_zero_points=True,
    )


def _check_columns(op: str, name: str, tensor: Tensor) -> None:
    if tensor.shape[1] == 0:
        raise ShapeError(f"{op}: {name} must have at least {TILE_COLUMNS} columns, it has none")


def _check_size(op: str, layout: StreamLayout, n_tiles: int, stored_rows: int) -> None:
    if stored_rows > MAX_STORED_ROWS:
        raise ShapeError(f"{op}: a matrix may have {MAX_STORED_ROWS} rows, this one has {stored_rows}")
    if layout.length * n_tiles >= 1 << 31:
        raise ShapeError(
            f"{op}: a matrix may take {(1 << 31) * UNIT_BYTES >> 30} GiB, this one takes "
            f"{layout.length * n_tiles * UNIT_BYTES >> 30}"
        )


def _unit_index(first_units: Sequence[int], count: int, device: torch.device) -> Tensor:
    """The units of several runs of `count` units, one run after the other."""
    starts = torch.tensor(first_units, dtype=torch.int64, device=device)
    return (starts[:, None] + torch.arange(count, device=device)).flatten()

"""Quantised matrices in the form that CUDA kernels read: one stream of headers and codes for each tile of columns.

`cuda/packed_stream.cuh` draws the layout; here is its other half, the packing, done once at load with torch operators
on the tensors' own device. Knows the formats of the codes, but nothing of files, launches or cards.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import codes as bit_codes
from exl2_rag.llm.kernels import reference
from exl2_rag.llm.kernels.weights import CHUNK_ROWS, TILE_COLUMNS, Group, parse_groups

LANES: Final = 32
UNIT_BYTES: Final = 16
EXL2_HEADER_UNITS: Final = 1
GPTQ_HEADER_UNITS: Final = 6
MAX_STORED_ROWS: Final = 65504
"""Rows that a matrix may have, padding included: 16-bit numbers name them in the file, and they are whole chunks."""

_PAIRS = 16
_MAX_SLICES = 16  # a block has as many warps
_MAX_SECTIONS = 8
_SECTION_BLOCKS = 160  # blocks of eight tiles that sections should make up together: about a large card's worth
_CHUNK_COST = 2  # work of a chunk beyond its bytes, in bits a weight
_SLAB_WEIGHTS = 1 << 24  # weights unpacked at a time: a few hundred MiB of scratch


@dataclass(frozen=True, slots=True)
class CudaWeights:
    """One K x N matrix, or several side by side that share their inputs, packed for CUDA kernels.

    Attributes:
        stream: [units, 4] int32, the units of all tiles.
        tiles: [N/32, 2] int32, (first unit of the tile's stream, first row of its table in `chunks`).
        chunks: [tables * C, 4] int32, per chunk: information, its unit and its group header's in the tile's stream, 0.
            Information is bits | chunks left in the group << 4 | group scale (float16 bits) << 16.
        slices: [S + 1] int32, first chunk of each slice of rows. The order of additions follows from them and from
            `n_sections`, which divides S.
        spans: [N/32, S, 4] int32, of each slice of each tile: the unit of its first header, that of its first chunk,
            the units of header and chunks together, 0.
        stored_rows: [K] int32, the stored row of each input feature; empty if that is the feature itself.
        features: [C * 32] int32, the input feature of each stored row, -1 for padding; empty if that is the row itself.
        widths: N of each of the matrices side by side; their sum is `out_features`.
        max_chunk_bits: of the widest code.
        has_zero_points: GPTQ of 4 bits; otherwise EXL2.
    """

    stream: Tensor
    tiles: Tensor
    chunks: Tensor
    slices: Tensor
    spans: Tensor
    stored_rows: Tensor
    features: Tensor
    in_features: int
    out_features: int
    widths: tuple[int, ...]
    n_chunks: int
    n_slices: int
    n_sections: int
    max_chunk_bits: int
    has_zero_points: bool

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        parts = (self.stream, self.tiles, self.chunks, self.slices, self.spans, self.stored_rows, self.features)
        return sum(part.nbytes for part in parts)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.stream.device

    @property
    def header_units(self) -> int:
        """Units before the chunks of a group."""
        return GPTQ_HEADER_UNITS if self.has_zero_points else EXL2_HEADER_UNITS


# ---- the bits of a chunk ----


def _pieces(bits: int, pair: int) -> list[tuple[int, int, int, int]]:
    """Where a pair's codes go: (word, first bit there, first bit of the code, number of bits), per half word."""
    if bits in {3, 5}:
        per_word = 15 // bits
        if pair < _PAIRS - 1:
            return [(pair // per_word, bits * (pair % per_word), 0, bits)]
        return [(bit, 15, bit, 1) for bit in range(bits)]
    if bits == 6:
        first, place = pair // 8 * 3, pair % 8
        if place < 6:
            return [(first + place // 2, place % 2 * 6, 0, 6)]
        return [(first + place - 6, 12, 0, 4), (first + 2, 12 + (place - 6) * 2, 4, 2)]
    per_word = 16 // bits
    return [(pair // per_word, bits * (pair % per_word), 0, bits)]


def pack_chunks(codes: Tensor, bits: int) -> Tensor:
    """Codes in the order of `packed_stream.cuh`.

    Args:
        codes: [C * 32, n * 32] int32, values 0 to 2**bits - 1.
        bits: width of a code.

    Returns:
        [n, C, bits * 32] int32: the words of each chunk of each tile.
    """
    n_chunks, n_tiles = codes.shape[0] // CHUNK_ROWS, codes.shape[1] // TILE_COLUMNS
    # Rows are 8t + 2j + h, columns 4g + c of a tile; lane 4g + t holds pairs 4c + j of halves h.
    split = codes.reshape(n_chunks, 4, 4, 2, n_tiles, 8, 4)  # C, t, j, h, n, g, c
    halves = split.permute(4, 0, 5, 1, 6, 2, 3).reshape(n_tiles, n_chunks, LANES, _PAIRS, 2)
    words = torch.zeros((n_tiles, n_chunks, LANES, bits), dtype=torch.int32, device=codes.device)
    for pair in range(_PAIRS):
        for word, first, code_bit, count in _pieces(bits, pair):
            part = (halves[:, :, :, pair] >> code_bit) & ((1 << count) - 1)
            words[..., word] |= (part[..., 0] << first) | (part[..., 1] << (first + 16))
    planes, start = [], 0
    for width in (4, 4, 2, 1):
        if start + width <= bits:
            planes.append(words[..., start : start + width].reshape(n_tiles, n_chunks, LANES * width))
            start += width
    return torch.cat(planes, dim=2)


def unpack_chunks(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_chunks`."""
    n_tiles, n_chunks = words.shape[:2]
    planes, start = [], 0
    for width in (4, 4, 2, 1):
        if start + width <= bits:
            plane = words[..., start * LANES : (start + width) * LANES]
            planes.append(plane.reshape(n_tiles, n_chunks, LANES, width))
            start += width
    lane_words = torch.cat(planes, dim=3)
    halves = torch.zeros((n_tiles, n_chunks, LANES, _PAIRS, 2), dtype=torch.int32, device=words.device)
    for pair in range(_PAIRS):
        for word, first, code_bit, count in _pieces(bits, pair):
            for half in range(2):
                part = (lane_words[..., word] >> (first + 16 * half)) & ((1 << count) - 1)
                halves[..., pair, half] |= part << code_bit
    split = halves.reshape(n_tiles, n_chunks, 8, 4, 4, 4, 2)  # n, C, g, t, c, j, h
    return split.permute(1, 3, 5, 6, 0, 2, 4).reshape(n_chunks * CHUNK_ROWS, n_tiles * TILE_COLUMNS)


# ---- tables ----


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things are in the stream of one tile, in units."""

    chunk_bits: list[int]
    chunk_units: list[int]
    group_of_chunk: list[int]
    header_units: list[int]  # of each group
    group_ends: list[int]  # the chunk after each group
    length: int

    @classmethod
    def of(cls, groups: Sequence[Group], header_units: int) -> _Layout:
        chunk_bits: list[int] = []
        chunk_units: list[int] = []
        group_of_chunk: list[int] = []
        headers: list[int] = []
        ends: list[int] = []
        at = 0
        for index, group in enumerate(groups):
            headers.append(at)
            at += header_units
            for _ in range(group.rows // CHUNK_ROWS):
                chunk_bits.append(group.bits)
                chunk_units.append(at)
                group_of_chunk.append(index)
                at += group.bits * CHUNK_ROWS * TILE_COLUMNS // 8 // UNIT_BYTES
            ends.append(len(chunk_bits))
        return cls(chunk_bits, chunk_units, group_of_chunk, headers, ends, at)

    def table(self, group_scales: Tensor | None) -> Tensor:
        """[C, 4] int32 on the CPU; group_scales: [G] float16, or None."""
        scales = [0] * len(self.header_units) if group_scales is None else group_scales.cpu().view(torch.int16).tolist()
        rows = []
        for chunk, (bits, unit, group) in enumerate(
            zip(self.chunk_bits, self.chunk_units, self.group_of_chunk, strict=True)
        ):
            # A scale's sign bit makes the word negative, as it should: the arithmetic is that of Python.
            info = bits | (self.group_ends[group] - chunk) << 4 | scales[group] << 16
            rows.append((info, unit, self.header_units[group], 0))
        return torch.tensor(rows, dtype=torch.int32)


def _partition(costs: Sequence[int], n_slices: int) -> list[int]:
    """First chunk of each slice, and the end: slices of about equal cost, none of them empty."""
    total, done, bounds = sum(costs), 0, [0]
    for chunk, cost in enumerate(costs):
        left, slices_left = len(costs) - chunk, n_slices - len(bounds)
        reached = (done + cost / 2) * n_slices >= total * len(bounds)
        if slices_left > 0 and chunk > bounds[-1] and (reached or left <= slices_left):
            bounds.append(chunk)
        done += cost
    return [*bounds, len(costs)]


def _cut(costs: Sequence[int], n_tiles: int) -> tuple[list[int], int]:
    """The slices of a matrix and how many sections they make: a function of the matrix alone, never of the card.

    Slices let many warps work on one tile of columns, sections many blocks. Either is a power of two.
    """
    n_slices = 1
    while n_slices * 2 <= min(_MAX_SLICES, len(costs) // 2):
        n_slices *= 2
    blocks = -(-n_tiles // 8)
    n_sections = 1
    while n_sections * 2 <= min(_MAX_SECTIONS, n_slices) and n_sections * 2 * blocks <= _SECTION_BLOCKS:
        n_sections *= 2
    return _partition(costs, n_slices), n_sections


def _spans(tiles: Tensor, chunks: Tensor, slices: Sequence[int], header_units: int) -> Tensor:
    """`CudaWeights.spans`, from its `tiles`, its `chunks` and the numbers in its `slices`."""
    starts = torch.tensor(slices[:-1], dtype=torch.int64, device=tiles.device)
    ends = torch.tensor(slices[1:], dtype=torch.int64, device=tiles.device) - 1
    base, table = tiles[:, :1].to(torch.int64), tiles[:, 1:].to(torch.int64)
    first, last = chunks[table + starts].to(torch.int64), chunks[table + ends].to(torch.int64)
    end = last[..., 1] + (last[..., 0] & 15) * (CHUNK_ROWS * TILE_COLUMNS // 8 // UNIT_BYTES)
    columns = (base + first[..., 2], base + first[..., 1], header_units + end - first[..., 1], torch.zeros_like(end))
    return torch.stack(columns, dim=2).to(torch.int32)


def _assemble(
    stream: Tensor,
    layout: _Layout,
    table: Tensor,
    stored_rows: Tensor,
    features: Tensor,
    *,
    in_features: int,
    has_zero_points: bool,
) -> CudaWeights:
    """stream: [tiles, units, 4] int32."""
    n_tiles, device = stream.shape[0], stream.device
    first_units = torch.arange(n_tiles, dtype=torch.int64, device=device) * layout.length
    costs = [bits + _CHUNK_COST for bits in layout.chunk_bits]
    slices, n_sections = _cut(costs, n_tiles)
    tiles = torch.stack((first_units, torch.zeros_like(first_units)), dim=1).to(torch.int32)
    chunks = table.to(device)
    return CudaWeights(
        stream=stream.reshape(-1, 4),
        tiles=tiles,
        chunks=chunks,
        slices=torch.tensor(slices, dtype=torch.int32, device=device),
        spans=_spans(tiles, chunks, slices, GPTQ_HEADER_UNITS if has_zero_points else EXL2_HEADER_UNITS),
        stored_rows=stored_rows,
        features=features,
        in_features=in_features,
        out_features=n_tiles * TILE_COLUMNS,
        widths=(n_tiles * TILE_COLUMNS,),
        n_chunks=len(layout.chunk_bits),
        n_slices=len(slices) - 1,
        n_sections=n_sections,
        max_chunk_bits=max(layout.chunk_bits),
        has_zero_points=has_zero_points,
    )


def _unit_index(first_units: Sequence[int], count: int, device: torch.device) -> Tensor:
    """The units of several runs of `count` units, one run after the other."""
    starts = torch.tensor(first_units, dtype=torch.int64, device=device)
    return (starts[:, None] + torch.arange(count, device=device)).flatten()


# ---- EXL2 ----


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
    _check_part("exl2_prepare", "q_weight", q_weight, torch.int32, 2)
    _check_part("exl2_prepare", "q_groups", q_groups, torch.int16, 1)
    _check_part("exl2_prepare", "q_scale", q_scale, torch.int32, 2)
    _check_part("exl2_prepare", "q_scale_max", q_scale_max, torch.float16, 1)
    _check_part("exl2_prepare", "q_invperm", q_invperm, torch.int32, 1)
    _check_columns("exl2_prepare", "q_weight", q_weight)
    packed_rows, out_features = q_weight.shape
    try:
        groups = parse_groups([number & 0xFFFF for number in q_groups.tolist()], packed_rows)
    except ValueError as error:
        raise ShapeError(f"exl2_prepare: {error}; the tensors are not one EXL2 matrix") from error
    in_features = sum(group.rows for group in groups)
    wanted = ((in_features,), (len(groups), out_features // 8), (len(groups),))
    if (q_invperm.shape, q_scale.shape, q_scale_max.shape) != wanted:
        raise ShapeError(
            f"exl2_prepare: q_groups describes {in_features} rows in {len(groups)} groups and q_weight has "
            f"{out_features} columns, but q_invperm is {list(q_invperm.shape)}, q_scale {list(q_scale.shape)} and "
            f"q_scale_max {list(q_scale_max.shape)}"
        )
    stored_rows = q_invperm.to(torch.int64) & 0xFFFF
    features = torch.argsort(stored_rows)
    identity = torch.arange(in_features, device=q_invperm.device)
    if not torch.equal(stored_rows[features], identity):
        raise ShapeError(f"exl2_prepare: q_invperm must name each of the {in_features} stored rows once")
    if torch.equal(features, identity):
        stored_rows, features = stored_rows[:0], features[:0]

    layout = _Layout.of(groups, EXL2_HEADER_UNITS)
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
    return _assemble(
        stream,
        layout,
        layout.table(reference.exl2_group_scales(q_scale_max, prescale)),
        stored_rows.to(torch.int32),
        features.to(torch.int32),
        in_features=in_features,
        has_zero_points=False,
    )


# ---- GPTQ ----


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
    _check_part("gptq_prepare", "qweight", qweight, torch.int32, 2)
    _check_part("gptq_prepare", "qzeros", qzeros, torch.int32, 2)
    _check_columns("gptq_prepare", "qweight", qweight)
    in_features, out_features, device = qweight.shape[0] * 8, qweight.shape[1], qweight.device
    if scales.dim() != 2 or scales.shape[1] != out_features or qzeros.shape != (scales.shape[0], out_features // 8):
        raise ShapeError(
            f"gptq_prepare: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales "
            f"{list(scales.shape)} do not describe one matrix"
        )
    if g_idx is not None and (
        g_idx.shape != (in_features,) or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < scales.shape[0]
    ):
        raise ShapeError(f"gptq_prepare: g_idx must be [{in_features}] with values 0 to {scales.shape[0] - 1}")
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
    layout = _Layout.of(groups, GPTQ_HEADER_UNITS)
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
    return _assemble(
        stream,
        layout,
        layout.table(None),
        stored_rows.to(device, torch.int32),
        features.to(device, torch.int32),
        in_features=in_features,
        has_zero_points=True,
    )


def _check_part(op: str, name: str, tensor: Tensor, dtype: torch.dtype, dims: int) -> None:
    if tensor.dtype != dtype:
        raise DTypeError(f"{op}: {name} must be {dtype}, it is {tensor.dtype}")
    if tensor.dim() != dims:
        raise ShapeError(f"{op}: {name} must have {dims} dimension(s), its shape is {list(tensor.shape)}")


def _check_columns(op: str, name: str, tensor: Tensor) -> None:
    if tensor.shape[1] == 0 or tensor.shape[1] % TILE_COLUMNS:
        raise ShapeError(f"{op}: {name} must have a multiple of {TILE_COLUMNS} columns, it has {tensor.shape[1]}")


def _check_size(op: str, layout: _Layout, n_tiles: int, stored_rows: int) -> None:
    if stored_rows > MAX_STORED_ROWS:
        raise ShapeError(f"{op}: a matrix may have {MAX_STORED_ROWS} rows, this one has {stored_rows}")
    if layout.length * n_tiles >= 1 << 31:
        raise ShapeError(
            f"{op}: a matrix may take {(1 << 31) * UNIT_BYTES >> 30} GiB, this one takes "
            f"{layout.length * n_tiles * UNIT_BYTES >> 30}"
        )


# ---- several matrices as one ----


def can_stack(matrices: Sequence[CudaWeights]) -> bool:
    """Whether `stack` would take them: one format, the same stored rows for the same inputs, room for the offsets."""
    first = matrices[0]
    alike = all(
        other.has_zero_points == first.has_zero_points
        and other.in_features == first.in_features
        and other.n_chunks == first.n_chunks
        and other.device == first.device
        and torch.equal(other.features, first.features)
        for other in matrices[1:]
    )
    return alike and sum(matrix.stream.shape[0] for matrix in matrices) < 1 << 31


def stack(matrices: Sequence[CudaWeights]) -> CudaWeights:
    """Matrices of the same inputs side by side, so that one launch multiplies by all: q, k and v, or gate and up.

    Widths and groups of the codes may differ. Call `can_stack` first; it costs a comparison on the device.

    Raises:
        ShapeError: they do not share their inputs.
    """
    if not matrices or not can_stack(matrices):
        raise ShapeError(
            "stack: matrices must be of one format and store the same input features in the same rows; multiply by "
            "them one by one"
        )
    first = matrices[0]
    tiles, units, tables = [], 0, 0
    costs = [0] * first.n_chunks
    for matrix in matrices:
        tiles.append(matrix.tiles + torch.tensor([units, tables], dtype=torch.int32, device=matrix.device))
        units += matrix.stream.shape[0]
        tables += matrix.chunks.shape[0]
        for table, group in itertools.groupby(matrix.tiles[:, 1].tolist()):
            n_tiles = sum(1 for _ in group)
            for chunk, info in enumerate(matrix.chunks[table : table + matrix.n_chunks, 0].tolist()):
                costs[chunk] += ((info & 15) + _CHUNK_COST) * n_tiles
    widths = tuple(itertools.chain.from_iterable(matrix.widths for matrix in matrices))
    slices, n_sections = _cut(costs, sum(widths) // TILE_COLUMNS)
    all_tiles, all_chunks = torch.cat(tiles), torch.cat([matrix.chunks for matrix in matrices])
    return dataclasses.replace(
        first,
        stream=torch.cat([matrix.stream for matrix in matrices]),
        tiles=all_tiles,
        chunks=all_chunks,
        slices=torch.tensor(slices, dtype=torch.int32, device=first.device),
        spans=_spans(all_tiles, all_chunks, slices, first.header_units),
        out_features=sum(widths),
        widths=widths,
        n_slices=len(slices) - 1,
        n_sections=n_sections,
        max_chunk_bits=max(matrix.max_chunk_bits for matrix in matrices),
    )

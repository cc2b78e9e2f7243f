"""Quantised matrices in the form that CUDA kernels read: one stream of headers and codes for each tile of columns.

`cuda/packed_stream.cuh` draws the layout; here are its tables, and how matrices are put side by side. `cuda_prepare`
fills the streams. Knows nothing of files, launches or cards.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from exl2_rag.errors import ShapeError
from exl2_rag.llm.kernels.cuda_packing import UNIT_BYTES
from exl2_rag.llm.kernels.weights import CHUNK_ROWS, TILE_COLUMNS, Group

EXL2_HEADER_UNITS: Final = 1
GPTQ_HEADER_UNITS: Final = 6

_MAX_SLICES = 16  # a block has as many warps
_MAX_SECTIONS = 8
_SECTION_BLOCKS = 160  # blocks of eight tiles that sections should make up together: about a large card's worth
_CHUNK_COST = 2  # work of a chunk beyond its bytes, in bits a weight


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


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """Where things are in the stream of one tile, in units."""

    chunk_bits: list[int]
    chunk_units: list[int]
    group_of_chunk: list[int]
    header_units: list[int]  # of each group
    group_ends: list[int]  # the chunk after each group
    length: int

    @classmethod
    def of(cls, groups: Sequence[Group], header_units: int) -> StreamLayout:
        """The stream of these groups, each with so many units before its chunks."""
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


def assemble(
    stream: Tensor,
    layout: StreamLayout,
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

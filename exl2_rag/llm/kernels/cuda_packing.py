"""The order of codes within a chunk as CUDA kernels read them; `cuda/packed_stream.cuh` draws it. Tensors only."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from exl2_rag.llm.kernels.weights import CHUNK_ROWS, TILE_COLUMNS

LANES: Final = 32
UNIT_BYTES: Final = 16
_PAIRS: Final = 16


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

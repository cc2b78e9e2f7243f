"""The bit rule of EXL2 in plain torch: codes of 2 to 8 bits in 32-bit words, down the rows of each column.

Within a group, the words of one column form a bit string, lowest bit first; the code of row r is bits [r*b, r*b + b)
of it. 32 rows fill exactly b words, so everything here works on chunks of 32 rows, and a code may straddle two words.

    b = 3   word 0: code 0 in bits 0-2, code 1 in bits 3-5, ..., code 10 in bits 30-31 and bit 0 of word 1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exl2_rag.llm.kernels.weights import CHUNK_ROWS, Group


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Codes of consecutive chunks of one width.

    Args:
        words: [C * bits, n] int32, C chunks of 32 rows.
        bits: width of a code.

    Returns:
        [C * 32, n] int32, values 0 to 2**bits - 1.
    """
    chunks = words.reshape(-1, bits, words.shape[1])
    codes = torch.empty((chunks.shape[0], CHUNK_ROWS, words.shape[1]), dtype=torch.int32, device=words.device)
    mask = (1 << bits) - 1
    for row in range(CHUNK_ROWS):
        word, shift = divmod(row * bits, 32)
        # The shift is arithmetic, but the mask drops the copies of the sign bit that it brings in.
        value = (chunks[:, word] >> shift) & (mask if shift + bits <= 32 else (1 << (32 - shift)) - 1)
        if shift + bits > 32:
            value = value | ((chunks[:, word + 1] << (32 - shift)) & mask)
        codes[:, row] = value
    return codes.reshape(-1, words.shape[1])


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_codes`.

    Args:
        codes: [C * 32, n] integers, 0 to 2**bits - 1.
        bits: width of a code.

    Returns:
        [C * bits, n] int32.
    """
    chunks = codes.to(torch.int64).reshape(-1, CHUNK_ROWS, codes.shape[1])
    words = torch.zeros((chunks.shape[0], bits, codes.shape[1]), dtype=torch.int64, device=codes.device)
    for row in range(CHUNK_ROWS):
        word, shift = divmod(row * bits, 32)
        shifted = chunks[:, row] << shift
        words[:, word] |= shifted & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= shifted >> 32
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).reshape(-1, codes.shape[1])


def unpack_nibbles(words: Tensor) -> Tensor:
    """[..., n/8] int32 to [..., n] int32: eight 4-bit numbers a word, lowest first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).flatten(-2)


def pack_nibbles(values: Tensor) -> Tensor:
    """The inverse of `unpack_nibbles`: [..., n] integers 0 to 15, n a multiple of 8, to [..., n/8] int32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int64, device=values.device)
    words = (values.to(torch.int64).reshape(*values.shape[:-1], -1, 8) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def width_runs(groups: Sequence[Group]) -> list[tuple[int, int, int, int]]:
    """Runs of groups of one width, as (bits, first packed row, first row, rows): each is one `unpack_codes`."""
    runs: list[tuple[int, int, int, int]] = []
    row = 0
    for group in groups:
        if runs and runs[-1][0] == group.bits:
            bits, first_packed, first, rows = runs[-1]
            runs[-1] = (bits, first_packed, first, rows + group.rows)
        else:
            runs.append((group.bits, group.first_packed_row, row, group.rows))
        row += group.rows
    return runs


def dequantise(words: Tensor, scale_words: Tensor, group_scales: Tensor, groups: Sequence[Group]) -> Tensor:
    """The weights of packed columns, in stored row order, exactly as the format defines them.

    Each of the two products is rounded once to float16, subnormals kept. Both are exact in float32 before that.

    Args:
        words: [R, n] int32.
        scale_words: [G, n/8] int32.
        group_scales: [G] float16.
        groups: what `parse_groups` made of the table.

    Returns:
        [K, n] float16.
    """
    squares = (unpack_nibbles(scale_words) + 1).to(torch.float32).square_()
    column_scales = (squares * group_scales.to(torch.float32)[:, None]).to(torch.float16).to(torch.float32)
    sizes = torch.tensor([group.rows for group in groups], device=words.device)
    group_of_row = torch.repeat_interleave(torch.arange(len(groups), device=words.device), sizes)
    weights = torch.empty((len(group_of_row), words.shape[1]), dtype=torch.float16, device=words.device)
    for bits, first_packed, first, rows in width_runs(groups):
        codes = unpack_codes(words[first_packed : first_packed + rows * bits // CHUNK_ROWS], bits)
        centred = (codes - (1 << (bits - 1))).to(torch.float32)
        weights[first : first + rows] = (centred * column_scales[group_of_row[first : first + rows]]).to(torch.float16)
    return weights

"""Quantised pages of the KV cache: how a key or value vector becomes codes and scales, and back.

The format of q8, q6 and q4. A vector of D numbers is rotated by a normalised Walsh-Hadamard transform of each block
of the largest power of two that divides D; then each group of 32 numbers becomes codes of b bits and a float16 scale:

    scale = float16(x* / -2^(b-1))                    x* the number of largest magnitude, of equals the first
    code  = clamp(round(x / scale), -2^(b-1), 2^(b-1) - 1) + 2^(b-1)
    value = float16((code - 2^(b-1)) * scale)

so that the number of largest magnitude uses the end of the range that has one code more. Rotating spreads outliers; as
the rotation keeps dot products, scores need no rotating back, only queries rotated likewise, and attention's result is
rotated back once. Byte layout: see cuda/kv_pages.cuh, of which `pack_codes` is the twin.

Everything here is plain torch in float32 and in a fixed order, so the CUDA kernels reproduce it bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import weight_memory

QUANT_GROUP: Final = 32
"""Numbers that share a scale."""

CACHE_BITS: Final = (4, 6, 8)
"""Bits a code may have."""

_MAX_SCALE = 65504.0  # the largest float16


@dataclass(frozen=True, slots=True)
class QuantisedPages:
    """The keys, or the values, of one layer in quantised pages.

    Attributes:
        codes: [P, PS, KH, D * bits / 8] uint8.
        scales: [P, PS, KH, D / 32] float16.
    """

    codes: Tensor
    scales: Tensor

    @staticmethod
    def zeros(
        n_pages: int, page_size: int, n_kv_heads: int, head_dim: int, *, bits: int, device: torch.device
    ) -> QuantisedPages:
        """Pages whose every number is 0; on the CPU they take memory only as they are written to.

        Raises:
            ShapeError: `bits` is not 4, 6 or 8, or `head_dim` no multiple of 32.
        """
        if bits not in CACHE_BITS or head_dim % QUANT_GROUP:
            raise ShapeError(
                f"quantised pages must have 4, 6 or 8 bits and heads of a multiple of {QUANT_GROUP} numbers, asked for "
                f"{bits} bits and {head_dim} numbers; use float16 pages for other models"
            )
        shape = (n_pages, page_size, n_kv_heads)
        code_shape, scale_shape = (*shape, head_dim * bits // 8), (*shape, head_dim // QUANT_GROUP)
        if device.type == "cpu":
            return QuantisedPages(
                weight_memory.zeros(code_shape, torch.uint8), weight_memory.zeros(scale_shape, torch.float16)
            )
        return QuantisedPages(
            torch.zeros(code_shape, dtype=torch.uint8, device=device),
            torch.zeros(scale_shape, dtype=torch.float16, device=device),
        )

    @property
    def head_dim(self) -> int:
        """D."""
        return self.scales.shape[3] * QUANT_GROUP

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.codes.shape[3] * 8 // self.head_dim

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.codes.nbytes + self.scales.nbytes

    def check(self, op: str, name: str) -> None:
        """Refuse tensors that are not pages of this format.

        Raises:
            ShapeError, DTypeError: what does not fit.
        """
        if self.codes.dtype != torch.uint8 or self.scales.dtype != torch.float16:
            raise DTypeError(
                f"{op}: {name} must have uint8 codes and float16 scales, it has {self.codes.dtype} and "
                f"{self.scales.dtype}"
            )
        shapes = f"{list(self.codes.shape)} and {list(self.scales.shape)}"
        if self.codes.dim() != 4 or self.scales.shape[:3] != self.codes.shape[:3] or self.scales.dim() != 4:
            raise ShapeError(f"{op}: {name} must have codes and scales [P, PS, KH, ...], they are {shapes}")
        if self.bits not in CACHE_BITS or self.bits * self.head_dim != self.codes.shape[3] * 8:
            raise ShapeError(f"{op}: {name} must have codes of 4, 6 or 8 bits in groups of 32, its shapes are {shapes}")
        if not self.codes.is_contiguous() or not self.scales.is_contiguous():
            raise ShapeError(f"{op}: {name} must be contiguous")


def rotation_block(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`."""
    return head_dim & -head_dim


def rotation_factor(head_dim: int) -> float:
    """1 / sqrt(block), rounded to float32."""
    return float(np.float32(1.0 / math.sqrt(rotation_block(head_dim))))


def rotate(x: Tensor) -> Tensor:
    """The transform, [..., D] to [..., D] float32; its own inverse. As in cuda/hadamard.cuh, addition by addition."""
    head_dim = x.shape[-1]
    shape = x.shape
    x = x.to(torch.float32)
    h = 1
    while h < rotation_block(head_dim):
        pairs = x.reshape(*shape[:-1], head_dim // (2 * h), 2, h)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((first + second, first - second), dim=-2).reshape(shape)
        h *= 2
    return x * rotation_factor(head_dim)


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rotated vectors [..., D] float32 to codes [..., D] uint8, one a number, and scales [..., D/32] float16."""
    zero = 1 << (bits - 1)
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // QUANT_GROUP, QUANT_GROUP)
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    scales = (largest * (-1.0 / zero)).clamp(-_MAX_SCALE, _MAX_SCALE).to(torch.float16)
    wide = scales.to(torch.float32)[..., None]
    numbers = torch.where((wide == 0) | wide.isnan(), 0.0, torch.round(groups / wide))
    codes = numbers.clamp(-zero, zero - 1) + zero
    return codes.to(torch.uint8).reshape(x.shape), scales


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., D] uint8 to the bytes of the pages, [..., D * bits / 8] uint8."""
    if bits == 8:
        return codes.clone()
    eights = codes.to(torch.int64).reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8)
    low = ((eights & 15) << _low_shifts(codes.device)).sum(dim=-1)
    parts = _bytes_of(low, 4)
    if bits == 6:
        parts = torch.cat((parts, _bytes_of(((eights >> 4) << _high_shifts(codes.device)).sum(dim=-1), 2)), dim=-1)
    return parts


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`."""
    if bits == 8:
        return packed.clone()
    head_dim = packed.shape[-1] * 8 // bits
    low = _words_of(packed[..., : head_dim // 2], 4)
    eights = (low[..., None] >> _low_shifts(packed.device)) & 15
    if bits == 6:
        high = _words_of(packed[..., head_dim // 2 :], 2)
        eights += ((high[..., None] >> _high_shifts(packed.device)) & 3) << 4
    return eights.flatten(-2).to(torch.uint8)


def dequantise(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes [..., D] uint8, one a number, and scales [..., D/32] float16 to rotated vectors [..., D] float16."""
    numbers = codes.to(torch.float32) - (1 << (bits - 1))
    groups = numbers.reshape(*scales.shape, QUANT_GROUP) * scales.to(torch.float32)[..., None]
    return groups.to(torch.float16).reshape(codes.shape)


def dequantise_pages(pages: QuantisedPages) -> Tensor:
    """All numbers, [P, PS, KH, D] float16, in the rotated basis."""
    return dequantise(unpack_codes(pages.codes, pages.bits), pages.scales, pages.bits)


def _low_shifts(device: torch.device) -> Tensor:
    return torch.tensor([4 * (i // 2) + 16 * (i % 2) for i in range(8)], device=device)


def _high_shifts(device: torch.device) -> Tensor:
    return torch.tensor([2 * (i // 2) + 8 * (i % 2) for i in range(8)], device=device)


def _bytes_of(words: Tensor, n_bytes: int) -> Tensor:
    """[..., W] to [..., W * n_bytes] uint8, the lowest byte first."""
    shifts = torch.arange(n_bytes, device=words.device) * 8
    return ((words[..., None] >> shifts) & 255).to(torch.uint8).flatten(-2)


def _words_of(parts: Tensor, n_bytes: int) -> Tensor:
    """The inverse of `_bytes_of`, int64."""
    shifts = torch.arange(n_bytes, device=parts.device) * 8
    words = parts.to(torch.int64).reshape(*parts.shape[:-1], parts.shape[-1] // n_bytes, n_bytes)
    return (words << shifts).sum(dim=-1)

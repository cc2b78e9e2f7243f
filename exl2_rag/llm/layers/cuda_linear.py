"""Linear layers on CUDA: packed or plain matrices, alone or several that share their input in one launch.

The weights come from the checkpoint as in `linear.py`; they stay packed, in the form that CUDA kernels read. Row t of a
result depends on row t of the input alone; with T its bits may change where another kernel takes over, which is beyond
`PACKED_ROWS` rows for packed matrices and `GEMV_ROWS` for plain ones: there the library's products take over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.checkpoint.gptq_format import zero_offset
from exl2_rag.llm.kernels import cuda_matmul, cuda_small_ops, cuda_weights
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.kernels.cuda_weights import CudaWeights
from exl2_rag.llm.layers.linear import EXL2_PARTS, LinearSpec, check_linear

PACKED_ROWS: Final = cuda_matmul.LIBRARY_ROWS
"""Rows up to which packed matrices are multiplied as they are, by dtype of the activations."""

GEMV_ROWS: Final = 16
"""Rows up to which our own kernel multiplies by plain matrices."""

_SLAB_WEIGHTS: Final = 1 << 26  # of a plain matrix in another dtype, widened at a time
_LARGEST_HALF: Final = 65504.0


class CudaLinear(Protocol):
    """One or several matrices of the same input."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> list[Tensor]:
        """[T, in_features] float16 or float32 to [T, out_features] of each matrix, rows possibly apart."""

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual [T, out_features] float32, contiguous, += the product; for a single matrix."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """EXL2 or GPTQ matrices side by side.

    Attributes:
        bias: [sum of padded widths] float32, or None.
        out_features: true width of each matrix; the padded ones are in `weights`.
    """

    backend: Backend
    weights: CudaWeights
    bias: Tensor | None
    out_features: tuple[int, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.weights.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> list[Tensor]:
        """See `CudaLinear`."""
        product = cuda_matmul.packed_matmul(self.backend, x, self.weights, bias=self.bias, out_dtype=out_dtype)
        columns, start = [], 0
        for padded, width in zip(self.weights.widths, self.out_features, strict=True):
            columns.append(product[:, start : start + width])
            start += padded
        return columns

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """See `CudaLinear`."""
        if self.weights.out_features == residual.shape[1]:
            cuda_matmul.packed_matmul(self.backend, x, self.weights, bias=self.bias, residual=residual)
        else:
            residual += self(x, torch.float32)[0]


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """A plain matrix [out_features, in_features] of any float dtype; `bias` is float32 or None."""

    backend: Backend
    weight: Tensor
    bias: Tensor | None

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> list[Tensor]:
        """See `CudaLinear`."""
        if x.shape[0] <= GEMV_ROWS:
            return [
                cuda_small_ops.dense_gemv(self.backend, x, self.weight, bias=self.bias, out_dtype=out_dtype or x.dtype)
            ]
        return [self._library_product(x).to(out_dtype or x.dtype)]

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """See `CudaLinear`."""
        if x.shape[0] <= GEMV_ROWS:
            cuda_small_ops.dense_gemv(self.backend, x, self.weight, bias=self.bias, residual=residual)
        else:
            residual += self._library_product(x)

    def _library_product(self, x: Tensor) -> Tensor:
        """[T, out_features], with the bias: in the dtype of x if the weights have it too, else in float32."""
        if self.weight.dtype == x.dtype:
            product = x @ self.weight.T
            return product if self.bias is None else product.to(torch.float32) + self.bias
        # Widened a slab at a time: never the whole of a large matrix at once.
        step = max(1, _SLAB_WEIGHTS // self.weight.shape[1])
        wide = x.to(torch.float32)
        slabs = [wide @ slab.to(torch.float32).T for slab in torch.split(self.weight, step)]
        product = slabs[0] if len(slabs) == 1 else torch.cat(slabs, dim=1)
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True, slots=True)
class SeparateLinears:
    """Matrices of the same input that cannot lie side by side: of different kinds, or with different stored rows."""

    parts: tuple[CudaLinear, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return sum(part.weight_bytes for part in self.parts)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> list[Tensor]:
        """See `CudaLinear`."""
        return [part(x, out_dtype)[0] for part in self.parts]

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """Not for several matrices: nothing adds up q, k and v."""
        raise AssertionError("add_to is for a single matrix")


def load_cuda_linear(
    checkpoint: Checkpoint,
    specs: Sequence[LinearSpec],
    backend: Backend,
    *,
    device: torch.device,
    dtype: torch.dtype,
    gptq_format: str | None = None,
) -> CudaLinear:
    """Read matrices that share their input, and lay them side by side if that is possible.

    Args:
        checkpoint: has each of them in one of the three kinds.
        specs: their keys and sizes.
        backend: will multiply.
        device: where they go.
        dtype: of the activations; plain matrices are brought into it if that loses nothing that matters.
        gptq_format: `checkpoint_format` of the model's `quantization_config`.

    Raises:
        CheckpointError: a matrix is missing or has another shape.
    """
    parts: list[PackedLinear | PlainLinear] = []
    for spec in specs:
        check_linear(checkpoint, spec)
        tensors = {name: tensor.to(device) for name, tensor in checkpoint.linear(spec.key).items()}
        bias = tensors["bias"].to(torch.float32) if spec.bias else None
        kind = checkpoint.kind(spec.key)
        if kind == "dense":
            weight = as_activation_dtype(tensors["weight"], dtype)
            parts.append(PlainLinear(backend, weight, bias))
            continue
        if kind == "exl2":
            weights = cuda_weights.exl2_prepare(*(tensors[name] for name in EXL2_PARTS))
        else:
            weights = cuda_weights.gptq_prepare(
                tensors["qweight"],
                tensors["qzeros"],
                tensors["scales"],
                tensors.get("g_idx"),
                zero_offset=zero_offset(gptq_format),
            )
        parts.append(PackedLinear(backend, weights, bias, (spec.out_features,)))
    if len(parts) == 1:
        return parts[0]
    packed = [part for part in parts if isinstance(part, PackedLinear)]
    if len(packed) == len(parts) and cuda_weights.can_stack([part.weights for part in packed]):
        return _side_by_side(backend, packed)
    return SeparateLinears(tuple(parts))


def _side_by_side(backend: Backend, parts: Sequence[PackedLinear]) -> PackedLinear:
    bias = None
    if any(part.bias is not None for part in parts):
        zeros = [part.weights.stream.new_zeros(part.weights.out_features, dtype=torch.float32) for part in parts]
        bias = torch.cat([zero if part.bias is None else part.bias for part, zero in zip(parts, zeros, strict=True)])
    widths = tuple(width for part in parts for width in part.out_features)
    return PackedLinear(backend, cuda_weights.stack([part.weights for part in parts]), bias, widths)


def as_activation_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain matrix for activations of `dtype`, contiguous.

    float16 activations are multiplied on tensor cores only by float16 weights, so other weights are rounded to float16
    unless one of them is too large for it. float32 activations take weights as they are.
    """
    if dtype == torch.float16 and weight.dtype != dtype and bool(weight.abs().amax() <= _LARGEST_HALF):
        weight = weight.to(dtype)
    return weight.contiguous()

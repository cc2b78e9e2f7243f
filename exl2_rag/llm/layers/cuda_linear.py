"""Linear layers on CUDA: packed or plain matrices, alone or several that share their input in one launch.

The weights come from the checkpoint as in `linear.py`; they stay packed, in the form that CUDA kernels read. Row t of a
result depends on row t of the input alone; with T its bits may change where the library takes over: beyond
`cuda_matmul.LIBRARY_ROWS` rows for packed matrices and `cuda_dense.GEMV_ROWS` for plain ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.checkpoint.gptq_format import zero_offset
from exl2_rag.llm.kernels import cuda_dense, cuda_matmul, cuda_prepare, cuda_weights
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.kernels.cuda_weights import CudaWeights
from exl2_rag.llm.layers.linear import EXL2_PARTS, LinearSpec, check_linear

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
        library: let the library multiply many rows; else a row's bits never depend on the number of rows.
    """

    backend: Backend
    weights: CudaWeights
    bias: Tensor | None
    out_features: tuple[int, ...]
    library: bool = True

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.weights.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> list[Tensor]:
        """See `CudaLinear`."""
        product = cuda_matmul.packed_matmul(
            self.backend, x, self.weights, bias=self.bias, out_dtype=out_dtype, library_rows=self._library_rows
        )
        columns, start = [], 0
        for padded, width in zip(self.weights.widths, self.out_features, strict=True):
            columns.append(product[:, start : start + width])
            start += padded
        return columns

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """See `CudaLinear`."""
        if self.weights.out_features == residual.shape[1]:
            cuda_matmul.packed_matmul(
                self.backend, x, self.weights, bias=self.bias, residual=residual, library_rows=self._library_rows
            )
        else:
            residual += self(x, torch.float32)[0]

    @property
    def _library_rows(self) -> int | None:
        return -1 if self.library else None


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """A plain matrix [out_features, in_features] of any float dtype; `bias` is float32 or None.

    `library` is as for `PackedLinear`.
    """

    backend: Backend
    weight: Tensor
    bias: Tensor | None
    library: bool = True

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> list[Tensor]:
        """See `CudaLinear`."""
        return [
            cuda_dense.dense_matmul(
                self.backend, x, self.weight, bias=self.bias, out_dtype=out_dtype, library=self.library
            )
        ]

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """See `CudaLinear`."""
        cuda_dense.dense_matmul(self.backend, x, self.weight, bias=self.bias, residual=residual, library=self.library)


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
    library: bool = True,
) -> CudaLinear:
    """Read matrices that share their input, and lay them side by side if that is possible.

    Args:
        checkpoint: has each of them in one of the three kinds.
        specs: their keys and sizes.
        backend: will multiply.
        device: where they go.
        dtype: of the activations; plain matrices are brought into it if that loses nothing that matters.
        gptq_format: `checkpoint_format` of the model's `quantization_config`.
        library: as for `PackedLinear`.

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
            parts.append(PlainLinear(backend, weight, bias, library))
            continue
        if kind == "exl2":
            weights = cuda_prepare.exl2_prepare(*(tensors[name] for name in EXL2_PARTS))
        else:
            weights = cuda_prepare.gptq_prepare(
                tensors["qweight"],
                tensors["qzeros"],
                tensors["scales"],
                tensors.get("g_idx"),
                zero_offset=zero_offset(gptq_format),
            )
        parts.append(PackedLinear(backend, weights, bias, (spec.out_features,), library))
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
    return PackedLinear(backend, cuda_weights.stack([part.weights for part in parts]), bias, widths, parts[0].library)


def as_activation_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain matrix for activations of `dtype`, contiguous.

    float16 activations are multiplied on tensor cores only by float16 weights, so other weights are rounded to float16
    unless one of them is too large for it. float32 activations take weights as they are.
    """
    if dtype == torch.float16 and weight.dtype != dtype and bool(weight.abs().amax() <= _LARGEST_HALF):
        weight = weight.to(dtype)
    return weight.contiguous()

"""Products with plain matrices on CUDA: our own kernel for a few rows, where reading the matrix is all the work, and
the library's for many.

A row's result has the same bits whatever T is up to `GEMV_ROWS`; beyond, the library's depends on T in its last bits.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from exl2_rag.llm.kernels import cuda_small_ops
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.kernels.cuda_matmul import full_precision

GEMV_ROWS: Final = 16
"""Rows up to which our own kernel multiplies."""

_SLAB_WEIGHTS: Final = 1 << 26  # of a matrix in another dtype than the activations, widened at a time


def dense_matmul(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    library: bool = True,
) -> Tensor:
    """x times the transpose of a plain matrix.

    Args:
        backend: runs the kernel.
        x: [T, K] float16 or float32.
        weight: [N, K] float32, float16 or bfloat16, contiguous.
        bias: [N] float32, added.
        residual: [T, N] float32 with contiguous rows: the product is added to it in place, and it is returned.
        out_dtype: float16 or float32; None is the dtype of `x`. Not with `residual`.
        library: let the library multiply many rows; else our own kernel does, a few rows at a time.

    Returns:
        [T, N] in `out_dtype`, or `residual`. Sums are float32.
    """
    if x.shape[0] <= GEMV_ROWS:
        return cuda_small_ops.dense_gemv(backend, x, weight, bias=bias, residual=residual, out_dtype=out_dtype)
    if not library:
        return _few_at_a_time(backend, x, weight, bias=bias, residual=residual, out_dtype=out_dtype)
    product = _library_product(x, weight)
    if bias is not None:
        product = product.to(torch.float32) + bias
    if residual is None:
        return product.to(out_dtype or x.dtype)
    residual += product
    return residual


def _few_at_a_time(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """As `dense_matmul`, in pieces of at most `GEMV_ROWS` rows."""
    target = residual
    if target is None:
        target = torch.empty((x.shape[0], weight.shape[0]), dtype=out_dtype or x.dtype, device=x.device)
    for start in range(0, x.shape[0], GEMV_ROWS):
        rows = slice(start, start + GEMV_ROWS)
        if residual is not None:
            cuda_small_ops.dense_gemv(backend, x[rows], weight, bias=bias, residual=residual[rows])
        else:
            target[rows] = cuda_small_ops.dense_gemv(backend, x[rows], weight, bias=bias, out_dtype=out_dtype)
    return target


def _library_product(x: Tensor, weight: Tensor) -> Tensor:
    """[T, N] in the dtype of x if the weights have it too, else in float32."""
    with full_precision():
        if weight.dtype == x.dtype:
            return x @ weight.T
        # Widened a slab at a time: never the whole of a large matrix at once.
        wide = x.to(torch.float32)
        step = max(1, _SLAB_WEIGHTS // weight.shape[1])
        slabs = [wide @ slab.to(torch.float32).T for slab in torch.split(weight, step)]
        return slabs[0] if len(slabs) == 1 else torch.cat(slabs, dim=1)

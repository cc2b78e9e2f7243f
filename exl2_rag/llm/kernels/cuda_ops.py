"""The ops of `ops.py` on CUDA tensors: what `registry.py` registers for that device. Called by `ops.py`, which checks.

Quantised products are the exception: their weights have another form in a card's memory, which `cuda_weights.py` makes
and `cuda_matmul.packed_matmul` takes, so the operators of the CPU's form refuse.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from exl2_rag.errors import DeviceError
from exl2_rag.llm.kernels import cuda_dense, cuda_runtime, cuda_small_ops


def dense_matmul(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, accumulate: bool) -> None:
    """See `ops.dense_matmul`; writes y [T, N], float32 if it accumulates."""
    backend = cuda_runtime.backend(x.device)
    if accumulate:
        cuda_dense.dense_matmul(backend, x, weight, bias=bias, residual=y)
    else:
        y.copy_(cuda_dense.dense_matmul(backend, x, weight, bias=bias, out_dtype=y.dtype))


def embedding(table: Tensor, token_ids: Tensor) -> Tensor:
    """See `ops.embedding`. Ids are not checked: that would wait for the card."""
    return cuda_small_ops.embedding(cuda_runtime.backend(table.device), table, token_ids)


def add_into(y: Tensor, x: Tensor) -> None:
    """See `ops.add_into`."""
    y += x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    return cuda_small_ops.rms_norm(cuda_runtime.backend(x.device), x, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `ops.silu_mul`."""
    return cuda_small_ops.gated_activation(cuda_runtime.backend(gate.device), "silu", gate, up)


def silu_mul_into(gate: Tensor, up: Tensor) -> None:
    """See `ops.silu_mul_into`."""
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
    """See `ops.rope_cache_write`. Positions and slots are not checked: that would wait for the card."""
    backend = cuda_runtime.backend(q.device)
    return cuda_small_ops.rope_cache_write(backend, q, k, v, cos, sin, positions, slot_mapping, k_pages, v_pages)


def _refuse(name: str) -> Any:
    def refuse(*_arguments: object) -> NoReturn:
        raise DeviceError(
            f"{name}: on CUDA quantised matrices are prepared by cuda_weights and multiplied by "
            "cuda_matmul.packed_matmul; these were prepared for the CPU"
        )

    return refuse


def register(library: Any) -> None:
    """Register everything for the dispatch key of CUDA tensors."""
    for name in ("exl2_matmul", "gptq_matmul", "digits", "plane_matmul"):
        library.impl(name, _refuse(name), "CUDA")
    for function in (
        dense_matmul,
        embedding,
        add_into,
        rms_norm,
        silu_mul,
        silu_mul_into,
        rope_cache_write,
    ):
        library.impl(function.__name__, function, "CUDA")

"""Launchers of the small CUDA kernels: norms, rotary positions, activations, embedding.

Each takes the backend first, allocates its result and launches; shapes, dtypes and devices were checked by `ops.py`.
Nothing here waits for the card, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from exl2_rag.errors import ShapeError
from exl2_rag.llm.kernels.cuda_backend import F32, I32, I64, WARP_THREADS, Backend, ceil_div

_MAX_BLOCK: Final = 1024
_FLAT_BLOCK: Final = 256  # threads where each takes four numbers
_ROPE_BLOCK: Final = 128
_GEMV_WARPS: Final = 4
_SUFFIXES: Final = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def _row_block(columns: int) -> int:
    """Threads for one row, four columns each: a function of the row's length alone, or results would depend on T."""
    return min(_MAX_BLOCK, ceil_div(ceil_div(columns, 4), WARP_THREADS) * WARP_THREADS)


def _vectorised(columns: int, *tensors: Tensor) -> bool:
    """Whether every row of every tensor can be read four numbers at a time."""
    return columns % 4 == 0 and all(
        tensor.data_ptr() % (4 * tensor.element_size()) == 0 and all(stride % 4 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def _rows(x: Tensor) -> Tensor:
    """`x`, with rows contiguous in themselves; rows may be apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(backend: Backend, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [T, C] float32 or float16, normed and multiplied by weight [C] float32; result in `out_dtype`, else as x."""
    x = _rows(x)
    rows, columns = x.shape
    result = torch.empty((rows, columns), dtype=out_dtype or x.dtype, device=x.device)
    if result.numel() == 0:
        return result
    backend.launch(
        "rms_norm",
        f"rms_norm_{_SUFFIXES[x.dtype]}_{_SUFFIXES[result.dtype]}",
        (rows, 1, 1),
        (_row_block(columns), 1, 1),
        (
            x,
            weight,
            result,
            I32(columns),
            I64(x.stride(0)),
            F32(eps),
            I32(_vectorised(columns, x, weight, result)),
        ),
    )
    return result


def add_rms_norm(
    backend: Backend, residual: Tensor, delta: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """residual += delta, then as `rms_norm` of the new residual, to the bit.

    residual: [T, C] float32 with contiguous rows, changed in place. delta: [T, C] float32 or float16. The result is in
    `out_dtype`, else in the dtype of delta.
    """
    delta = _rows(delta)
    rows, columns = residual.shape
    result = torch.empty((rows, columns), dtype=out_dtype or delta.dtype, device=residual.device)
    if result.numel() == 0:
        return result
    backend.launch(
        "add_rms_norm",
        f"add_rms_norm_{_SUFFIXES[delta.dtype]}_{_SUFFIXES[result.dtype]}",
        (rows, 1, 1),
        (_row_block(columns), 1, 1),
        (
            residual,
            delta,
            weight,
            result,
            I32(columns),
            I64(residual.stride(0)),
            I64(delta.stride(0)),
            F32(eps),
            I32(_vectorised(columns, residual, delta, weight, result)),
        ),
    )
    return result


def gated_activation(backend: Backend, kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """f(gate) * up, both [T, I] of one dtype; kind: "silu", "gelu_tanh" or "gelu"."""
    gate, up = _rows(gate), _rows(up)
    rows, columns = gate.shape
    result = torch.empty((rows, columns), dtype=gate.dtype, device=gate.device)
    if result.numel() == 0:
        return result
    backend.launch(
        "gated_activation",
        f"{kind}_mul_{_SUFFIXES[gate.dtype]}",
        (rows, ceil_div(columns, 4 * _FLAT_BLOCK), 1),
        (_FLAT_BLOCK, 1, 1),
        (
            gate,
            up,
            result,
            I32(columns),
            I64(gate.stride(0)),
            I64(up.stride(0)),
            I32(_vectorised(columns, gate, up, result)),
        ),
    )
    return result


def embedding(backend: Backend, table: Tensor, token_ids: Tensor) -> Tensor:
    """Rows of table [V, C] as float32 [T, C]; token_ids [T] int64, contiguous, each less than V."""
    rows, columns = token_ids.shape[0], table.shape[1]
    result = torch.empty((rows, columns), dtype=torch.float32, device=table.device)
    if result.numel() == 0:
        return result
    backend.launch(
        "embedding",
        f"embedding_{_SUFFIXES[table.dtype]}",
        (rows, ceil_div(columns, 4 * _FLAT_BLOCK), 1),
        (_FLAT_BLOCK, 1, 1),
        (table, token_ids, result, I32(columns), I32(_vectorised(columns, table, result))),
    )
    return result


def rope_cache_write(
    backend: Backend,
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
    """See `ops.rope_cache_write`; q, k and v may be float16 and parts of one matrix. A negative slot is not written.

    Raises:
        ShapeError: heads of an odd or too large size.
    """
    rows, heads, head_dim = q.shape
    if head_dim % 2 or head_dim > 2 * _MAX_BLOCK:
        raise ShapeError(f"rope_cache_write: heads must have an even size up to {2 * _MAX_BLOCK}, it is {head_dim}")
    q, k, v = _tokens(q), _tokens(k), _tokens(v)
    result = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    if result.numel() == 0:
        return result
    kv_heads, pairs = k.shape[1], head_dim // 2
    heads_per_block = max(1, min(_ROPE_BLOCK // pairs, heads + 2 * kv_heads))
    backend.launch(
        "rope_cache_write",
        f"rope_cache_write_{_SUFFIXES[q.dtype]}_{_SUFFIXES[k_pages.dtype]}",
        (rows, ceil_div(heads + 2 * kv_heads, heads_per_block), 1),
        (pairs, heads_per_block, 1),
        (
            q,
            k,
            v,
            cos,
            sin,
            positions,
            slot_mapping,
            k_pages,
            v_pages,
            result,
            I32(heads),
            I32(kv_heads),
            I32(head_dim),
            I32(cos.shape[1]),
            I64(q.stride(0)),
            I64(k.stride(0)),
            I64(v.stride(0)),
        ),
    )
    return result


def _tokens(x: Tensor) -> Tensor:
    """`x` [T, n, D] with each token's numbers contiguous; tokens may be apart."""
    is_plain = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if is_plain else x.contiguous()


def dense_gemv(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, K] float32 or float16 times the transpose of weight [N, K] of any float dtype, for a few rows.

    With `residual` [T, N] float32 the product is added to it in place, and it is returned; else the result is in
    `out_dtype`, or the dtype of x. A row's bits depend neither on T nor on the other rows. Reads the matrix once for
    each four rows.
    """
    x = x.contiguous()
    rows, in_features = x.shape
    out_features = weight.shape[0]
    y = residual
    if y is None:
        y = torch.empty((rows, out_features), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows_per_block = 1 if rows == 1 else 4
    vectorised = in_features % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    backend.launch(
        "dense_gemv",
        f"dense_gemv_{_SUFFIXES[x.dtype]}_{_SUFFIXES[weight.dtype]}_{_SUFFIXES[y.dtype]}_r{rows_per_block}",
        (ceil_div(out_features, _GEMV_WARPS), ceil_div(rows, rows_per_block), 1),
        (_GEMV_WARPS * WARP_THREADS, 1, 1),
        (
            x,
            weight,
            bias,
            y,
            I32(in_features),
            I32(out_features),
            I32(rows),
            I64(y.stride(0)),
            I32(residual is not None),
            I32(vectorised),
        ),
    )
    return y

"""Calls into the C++ library: tensors in, pointers out. `ops.py` has checked shapes and types before.

The structures are those of cpu/ops.h, field by field. ctypes releases the interpreter lock during a call.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from exl2_rag.errors import KernelError, ShapeError
from exl2_rag.llm.kernels import reference
from exl2_rag.llm.kernels.weights import TILE_COLUMNS

_NO_MEMORY, _OUT_OF_RANGE = 1, 2
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FIELD_TYPES = {"*": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A structure of fields "type:name"; the types are pointers (*), int (i), int64 (l) and float (f)."""
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, _FIELD_TYPES[kind]) for kind, field in pairs]})


_Exl2Matmul = _structure(
    "Exl2Matmul",
    "*:x l:rows l:in l:out *:codes l:packed_rows *:scales *:group_scales *:groups l:n_groups *:perm *:y",
)
_GptqMatmul = _structure("GptqMatmul", "*:x l:rows l:in l:out *:codes *:scales *:zeros *:row_groups l:n_groups *:y")
_DenseMatmul = _structure("DenseMatmul", "*:x l:rows l:in l:out *:weight i:dtype *:y")
_RmsNorm = _structure("RmsNorm", "*:x *:weight l:rows l:columns f:eps *:y")
_SiluMul = _structure("SiluMul", "*:gate *:up l:count *:y")
_RopeCacheWrite = _structure(
    "RopeCacheWrite",
    "*:q *:k *:v *:cos *:sin *:positions *:slots l:rows l:heads l:kv_heads l:dim l:n_positions l:half l:n_slots "
    "*:k_pages *:v_pages i:dtype *:q_rotated",
)
_PagedAttention = _structure(
    "PagedAttention",
    "*:q *:k_pages *:v_pages i:dtype *:page_table *:query_starts *:context_lens l:rows l:heads l:kv_heads l:dim "
    "l:n_pages l:page_size l:batch l:table_width f:softmax_scale l:window *:y",
)


def _call(library: ctypes.CDLL, name: str, arguments: ctypes.Structure) -> None:
    status = library[f"exl2_op_{name}"](ctypes.byref(arguments))
    if status == _NO_MEMORY:
        raise KernelError(f"{name}: not enough memory for its scratch space; free some or make the batch smaller")
    if status == _OUT_OF_RANGE:
        raise ShapeError(f"{name}: a position, slot, page or length points outside its tensor")
    if status != 0:
        raise KernelError(f"{name}: the native library returned the unknown status {status}")


def exl2_matmul(
    library: ctypes.CDLL, x: Tensor, codes: Tensor, scales: Tensor, group_scales: Tensor, groups: Tensor, perm: Tensor
) -> Tensor:
    """See `ops.exl2_matmul`."""
    x = x.contiguous()
    rows, tiles = x.shape[0], codes.shape[0]
    out_features = tiles * TILE_COLUMNS
    y = torch.empty((rows, out_features), dtype=torch.float32)
    if rows:
        arguments = _Exl2Matmul(
            x.data_ptr(),
            rows,
            x.shape[1],
            out_features,
            codes.data_ptr(),
            codes.shape[1],
            scales.data_ptr(),
            group_scales.data_ptr(),
            groups.data_ptr(),
            groups.shape[0],
            perm.data_ptr() if perm.shape[0] else None,
            y.data_ptr(),
        )
        _call(library, "exl2_matmul", arguments)
    return y


def gptq_matmul(
    library: ctypes.CDLL, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, row_groups: Tensor
) -> Tensor:
    """See `ops.gptq_matmul`."""
    x = x.contiguous()
    rows, out_features = x.shape[0], codes.shape[0] * TILE_COLUMNS
    y = torch.empty((rows, out_features), dtype=torch.float32)
    if rows:
        arguments = _GptqMatmul(
            x.data_ptr(),
            rows,
            x.shape[1],
            out_features,
            codes.data_ptr(),
            scales.data_ptr(),
            zeros.data_ptr(),
            row_groups.data_ptr(),
            scales.shape[1],
            y.data_ptr(),
        )
        _call(library, "gptq_matmul", arguments)
    return y


def dense_matmul(library: ctypes.CDLL, x: Tensor, weight: Tensor) -> Tensor:
    """See `ops.dense_matmul`."""
    x = x.contiguous()
    rows, (out_features, in_features) = x.shape[0], weight.shape
    y = torch.empty((rows, out_features), dtype=torch.float32)
    if rows and out_features:
        arguments = _DenseMatmul(
            x.data_ptr(), rows, in_features, out_features, weight.data_ptr(), _DTYPES[weight.dtype], y.data_ptr()
        )
        _call(library, "dense_matmul", arguments)
    return y


def rms_norm(library: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        arguments = _RmsNorm(x.data_ptr(), weight.data_ptr(), x.shape[0], x.shape[1], eps, y.data_ptr())
        _call(library, "rms_norm", arguments)
    return y


def silu_mul(library: ctypes.CDLL, gate: Tensor, up: Tensor) -> Tensor:
    """See `ops.silu_mul`."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if gate.numel():
        _call(library, "silu_mul", _SiluMul(gate.data_ptr(), up.data_ptr(), gate.numel(), y.data_ptr()))
    return y


def rope_cache_write(
    library: ctypes.CDLL,
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
    """See `ops.rope_cache_write`."""
    q, k, v, cos, sin = q.contiguous(), k.contiguous(), v.contiguous(), cos.contiguous(), sin.contiguous()
    positions, slot_mapping = positions.contiguous(), slot_mapping.contiguous()
    rotated = torch.empty_like(q)
    rows, heads, dim = q.shape
    n_pages, page_size, kv_heads, _ = k_pages.shape
    if rows:
        arguments = _RopeCacheWrite(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions.data_ptr(),
            slot_mapping.data_ptr(),
            rows,
            heads,
            kv_heads,
            dim,
            cos.shape[0],
            cos.shape[1],
            n_pages * page_size,
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            _DTYPES[k_pages.dtype],
            rotated.data_ptr(),
        )
        _call(library, "rope_cache_write", arguments)
    return rotated


def paged_attention(
    library: ctypes.CDLL,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    softmax_scale: float,
    sliding_window: int,
) -> Tensor:
    """See `ops.paged_attention`."""
    q, page_table = q.contiguous(), page_table.contiguous()
    query_starts, context_lens = query_starts.contiguous(), context_lens.contiguous()
    rows, heads, dim = q.shape
    n_pages, page_size, kv_heads, _ = k_pages.shape
    y = torch.empty_like(q)
    arguments = _PagedAttention(
        q.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        _DTYPES[k_pages.dtype],
        page_table.data_ptr(),
        query_starts.data_ptr(),
        context_lens.data_ptr(),
        rows,
        heads,
        kv_heads,
        dim,
        n_pages,
        page_size,
        context_lens.shape[0],
        page_table.shape[1],
        softmax_scale,
        sliding_window,
        y.data_ptr(),
    )
    try:
        _call(library, "paged_attention", arguments)
    except ShapeError:
        # The reference names the sequence at fault.
        reference.check_batch(
            query_starts.tolist(), context_lens.tolist(), n_rows=rows, limit_tokens=page_table.shape[1] * page_size
        )
        raise
    return y

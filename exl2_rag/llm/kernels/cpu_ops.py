"""Calls into the C++ library: tensors in, pointers out. `ops.py` has checked shapes and types before.

The structures are those of cpu/ops.h, field by field. ctypes releases the interpreter lock during a call.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from exl2_rag.llm.kernels import status, tape, work_memory
from exl2_rag.llm.kernels.weight_memory import WeightMemory
from exl2_rag.llm.kernels.weights import CHUNK_ROWS, FEW_ROWS, TILE_COLUMNS

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FIELD_TYPES = {"*": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A structure of fields "type:name"; the types are pointers (*), int (i), int64 (l) and float (f)."""
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, _FIELD_TYPES[kind]) for kind, field in pairs]})


_Exl2Matmul = structure(
    "Exl2Matmul",
    "*:x l:rows l:in l:out *:codes l:packed_rows *:scales *:group_scales *:groups l:n_groups *:perm *:y",
)
_GptqMatmul = structure("GptqMatmul", "*:x l:rows l:in l:out *:codes *:scales *:zeros *:row_groups l:n_groups *:y")
_Exl2Planes = structure("Exl2Planes", "*:words l:packed_rows l:out *:groups l:n_groups *:scale_words *:planes *:scales")
_GptqPlanes = structure("GptqPlanes", "*:words l:in l:out *:perm *:planes")
_Digits = structure("Digits", "*:x l:rows l:in *:perm i:whole *:numbers *:scales *:sums")
_PlaneMatmul = structure(
    "PlaneMatmul",
    "i:whole *:numbers *:x_scales *:sums l:rows l:in l:out *:planes l:packed_rows *:scales *:group_scales *:zeros "
    "*:groups l:n_groups *:bias i:accumulate *:y",
)
_Embedding = structure("Embedding", "*:table i:dtype l:n_ids l:columns *:ids l:rows *:y")
_AddInto = structure("AddInto", "*:x l:count *:y")
_DenseMatmul = structure("DenseMatmul", "*:x l:rows l:in l:out *:weight i:dtype *:bias i:accumulate *:y")
_RmsNorm = structure("RmsNorm", "*:x *:weight l:rows l:columns f:eps *:y")
_SiluMul = structure("SiluMul", "*:gate *:up l:count *:y")
_RopeCacheWrite = structure(
    "RopeCacheWrite",
    "*:q *:k *:v *:cos *:sin *:positions *:slots l:rows l:heads l:kv_heads l:dim l:n_positions l:half l:n_slots "
    "*:k_pages *:v_pages i:dtype *:q_rotated",
)


def at(tensor: Tensor) -> int:
    """Where a tensor's numbers are. A tape that is being recorded keeps them there."""
    recording = tape.current()
    if recording is not None:
        recording.hold(tensor)
    return tensor.data_ptr()


def at_or_null(tensor: Tensor | None) -> int | None:
    """The same; null for a tensor that is missing or empty."""
    return None if tensor is None or tensor.numel() == 0 else at(tensor)


def call(library: ctypes.CDLL, name: str, arguments: ctypes.Structure) -> None:
    """Run the op `name`; a tape that is being recorded keeps the call.

    Raises:
        KernelError, ShapeError: see `status.check`.
    """
    recording = tape.current()
    if recording is not None:
        recording.append(name, arguments)
    status.check(name, library[f"exl2_op_{name}"](ctypes.byref(arguments)))


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
            at(x),
            rows,
            x.shape[1],
            out_features,
            at(codes),
            codes.shape[1],
            at(scales),
            at(group_scales),
            at(groups),
            groups.shape[0],
            at_or_null(perm),
            at(y),
        )
        call(library, "exl2_matmul", arguments)
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
            at(x),
            rows,
            x.shape[1],
            out_features,
            at(codes),
            at(scales),
            at(zeros),
            at(row_groups),
            scales.shape[1],
            at(y),
        )
        call(library, "gptq_matmul", arguments)
    return y


def dense_matmul(
    library: ctypes.CDLL, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, accumulate: bool
) -> None:
    """See `ops.dense_matmul`; writes y [T, N]."""
    x = x.contiguous()
    rows, (out_features, in_features) = x.shape[0], weight.shape
    if rows and out_features:
        arguments = _DenseMatmul(
            at(x),
            rows,
            in_features,
            out_features,
            at(weight),
            DTYPES[weight.dtype],
            at_or_null(bias),
            int(accumulate),
            at(y),
        )
        call(library, "dense_matmul", arguments)


def exl2_planes(
    library: ctypes.CDLL, q_weight: Tensor, q_scale: Tensor, groups: Tensor, memory: WeightMemory
) -> tuple[Tensor, Tensor]:
    """See `reference_planes.exl2_planes`; `groups` is [G, 2] int32."""
    (packed_rows, out_features), n_groups = q_weight.shape, groups.shape[0]
    q_weight, q_scale = q_weight.contiguous(), q_scale.contiguous()
    planes = memory.empty((out_features // TILE_COLUMNS, packed_rows, 4 * TILE_COLUMNS))
    scales = memory.empty((out_features // TILE_COLUMNS, n_groups, TILE_COLUMNS // 2))
    arguments = _Exl2Planes(
        at(q_weight), packed_rows, out_features, at(groups), n_groups, at(q_scale), at(planes), at(scales)
    )
    call(library, "exl2_planes", arguments)
    return planes, scales


def gptq_planes(library: ctypes.CDLL, qweight: Tensor, perm: Tensor, memory: WeightMemory) -> Tensor:
    """See `reference_planes.gptq_planes`."""
    packed_rows, out_features = qweight.shape
    qweight = qweight.contiguous()
    planes = memory.empty((out_features // TILE_COLUMNS, packed_rows, 4 * TILE_COLUMNS))
    arguments = _GptqPlanes(at(qweight), packed_rows * 8, out_features, at_or_null(perm), at(planes))
    call(library, "gptq_planes", arguments)
    return planes


def digits(library: ctypes.CDLL, x: Tensor, perm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.digits`."""
    x = x.contiguous()
    rows, in_features = x.shape
    chunks = in_features // CHUNK_ROWS
    whole = rows > FEW_ROWS
    shape = (chunks, rows) if whole else (rows, chunks)
    numbers = work_memory.empty((*shape, CHUNK_ROWS if whole else 2 * CHUNK_ROWS), torch.int16 if whole else torch.int8)
    scales = work_memory.empty(shape, torch.float32)
    sums = work_memory.empty(shape, torch.int32)
    if rows:
        arguments = _Digits(at(x), rows, in_features, at_or_null(perm), int(whole), at(numbers), at(scales), at(sums))
        call(library, "digits", arguments)
    return numbers, scales, sums


def plane_matmul(
    library: ctypes.CDLL,
    y: Tensor,
    digits: Tensor,
    x_scales: Tensor,
    sums: Tensor,
    planes: Tensor,
    scales: Tensor,
    group_scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    bias: Tensor | None,
    accumulate: bool,
) -> None:
    """See `ops.plane_matmul`; writes y [T, N]."""
    rows, out_features = y.shape
    if rows:
        arguments = _PlaneMatmul(
            int(digits.dtype == torch.int16),
            at(digits),
            at(x_scales),
            at(sums),
            rows,
            digits.numel() // rows if digits.dtype == torch.int16 else digits.numel() // (2 * rows),
            out_features,
            at(planes),
            planes.shape[1],
            at(scales),
            at_or_null(group_scales),
            at_or_null(zeros),
            at(groups),
            groups.shape[0],
            at_or_null(bias),
            int(accumulate),
            at(y),
        )
        call(library, "plane_matmul", arguments)


def embedding(library: ctypes.CDLL, table: Tensor, token_ids: Tensor) -> Tensor:
    """See `ops.embedding`."""
    token_ids = token_ids.contiguous()
    y = work_memory.empty((token_ids.shape[0], table.shape[1]), torch.float32)
    arguments = _Embedding(
        at(table), DTYPES[table.dtype], table.shape[0], table.shape[1], at(token_ids), token_ids.shape[0], at(y)
    )
    call(library, "embedding", arguments)
    return y


def add_into(library: ctypes.CDLL, y: Tensor, x: Tensor) -> None:
    """See `ops.add_into`."""
    x = x.contiguous()
    call(library, "add_into", _AddInto(at(x), x.numel(), at(y)))


def rms_norm(library: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    x, weight = x.contiguous(), weight.contiguous()
    y = work_memory.empty(tuple(x.shape), x.dtype)
    if x.numel():
        arguments = _RmsNorm(at(x), at(weight), x.shape[0], x.shape[1], eps, at(y))
        call(library, "rms_norm", arguments)
    return y


def silu_mul(library: ctypes.CDLL, gate: Tensor, up: Tensor) -> Tensor:
    """See `ops.silu_mul`."""
    gate, up = gate.contiguous(), up.contiguous()
    y = work_memory.empty(tuple(gate.shape), gate.dtype)
    if gate.numel():
        call(library, "silu_mul", _SiluMul(at(gate), at(up), gate.numel(), at(y)))
    return y


def silu_mul_into(library: ctypes.CDLL, gate: Tensor, up: Tensor) -> None:
    """See `ops.silu_mul_into`."""
    up = up.contiguous()
    if gate.numel():
        call(library, "silu_mul", _SiluMul(at(gate), at(up), gate.numel(), at(gate)))


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
    rotated = work_memory.empty(tuple(q.shape), q.dtype)
    rows, heads, dim = q.shape
    n_pages, page_size, kv_heads, _ = k_pages.shape
    if rows:
        arguments = _RopeCacheWrite(
            at(q),
            at(k),
            at(v),
            at(cos),
            at(sin),
            at(positions),
            at(slot_mapping),
            rows,
            heads,
            kv_heads,
            dim,
            cos.shape[0],
            cos.shape[1],
            n_pages * page_size,
            at(k_pages),
            at(v_pages),
            DTYPES[k_pages.dtype],
            at(rotated),
        )
        call(library, "rope_cache_write", arguments)
    return rotated

"""The ops as torch operators: schemas, implementations per device, fakes. Called by `ops.py`, which checks first.

The operators take plain tensors, so they can be traced; `ops.py` gives them their types.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exl2_rag.llm.kernels import cpu_ops, cuda_ops, native, reference, reference_planes
from exl2_rag.llm.kernels.weights import (
    CHUNK_ROWS,
    FEW_ROWS,
    TILE_COLUMNS,
    Digits,
    Exl2Weights,
    GptqWeights,
    PlaneWeights,
)

_new_library: Any = torch.library.Library  # torch ships it without annotations
_library = _new_library("exl2_rag", "DEF")
_library.define(
    "exl2_matmul(Tensor x, Tensor codes, Tensor scales, Tensor group_scales, Tensor groups, Tensor perm) -> Tensor"
)
_library.define("gptq_matmul(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor row_groups) -> Tensor")
_library.define("digits(Tensor x, Tensor perm) -> (Tensor, Tensor, Tensor)")
_library.define(
    "plane_matmul(Tensor(a!) y, Tensor digits, Tensor x_scales, Tensor sums, Tensor planes, Tensor scales, "
    "Tensor group_scales, Tensor zeros, Tensor groups, Tensor? bias, bool accumulate) -> ()"
)
_library.define("embedding(Tensor table, Tensor token_ids) -> Tensor")
_library.define("add_into(Tensor(a!) y, Tensor x) -> ()")
_library.define("dense_matmul(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, bool accumulate) -> ()")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define("silu_mul(Tensor gate, Tensor up) -> Tensor")
_library.define("silu_mul_into(Tensor(a!) gate, Tensor up) -> ()")
_library.define(
    "rope_cache_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, "
    "Tensor(a!) k_pages, Tensor(b!) v_pages) -> Tensor"
)


def _cpu_exl2_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, group_scales: Tensor, groups: Tensor, perm: Tensor
) -> Tensor:
    library = native.library()
    if library is not None:
        return cpu_ops.exl2_matmul(library, x, codes, scales, group_scales, groups, perm)
    out_features = codes.shape[0] * TILE_COLUMNS
    return reference.exl2_matmul(x, Exl2Weights(codes, scales, group_scales, groups, perm, x.shape[1], out_features))


def _cpu_gptq_matmul(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, row_groups: Tensor) -> Tensor:
    library = native.library()
    if library is not None:
        return cpu_ops.gptq_matmul(library, x, codes, scales, zeros, row_groups)
    out_features = codes.shape[0] * TILE_COLUMNS
    return reference.gptq_matmul(x, GptqWeights(codes, scales, zeros, row_groups, x.shape[1], out_features))


def _cpu_digits(x: Tensor, perm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    library = native.library()
    if library is not None:
        return cpu_ops.digits(library, x, perm)
    made = reference_planes.digits(x, perm)
    return made.digits, made.scales, made.sums


def _cpu_plane_matmul(
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
    library = native.library()
    if library is not None:
        cpu_ops.plane_matmul(
            library, y, digits, x_scales, sums, planes, scales, group_scales, zeros, groups, bias, accumulate
        )
        return
    x = Digits(digits, x_scales, sums)
    out_features = planes.shape[0] * TILE_COLUMNS
    weights = PlaneWeights(planes, scales, group_scales, zeros, groups, groups[:0], x.in_features, out_features)
    product = reference_planes.plane_matmul(x, weights, width=y.shape[1], bias=bias)
    y.copy_(y + product if accumulate else product)


def _cpu_embedding(table: Tensor, token_ids: Tensor) -> Tensor:
    library = native.library()
    if library is not None:
        return cpu_ops.embedding(library, table, token_ids)
    return reference.embedding(table, token_ids)


def _cpu_add_into(y: Tensor, x: Tensor) -> None:
    library = native.library()
    if library is not None:
        cpu_ops.add_into(library, y, x)
    else:
        reference.add_into(y, x)


def _cpu_dense_matmul(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, accumulate: bool) -> None:
    library = native.library()
    if library is not None:
        cpu_ops.dense_matmul(library, y, x, weight, bias, accumulate)
        return
    product = reference.dense_matmul(x, weight, bias=bias)
    y.copy_(y + product if accumulate else product)


def _cpu_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    library = native.library()
    if library is not None:
        return cpu_ops.rms_norm(library, x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def _cpu_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    library = native.library()
    if library is not None:
        return cpu_ops.silu_mul(library, gate, up)
    return reference.silu_mul(gate, up)


def _cpu_silu_mul_into(gate: Tensor, up: Tensor) -> None:
    library = native.library()
    if library is not None:
        cpu_ops.silu_mul_into(library, gate, up)
    else:
        reference.silu_mul_into(gate, up)


def _cpu_rope_cache_write(
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
    library = native.library()
    if library is not None:
        return cpu_ops.rope_cache_write(library, q, k, v, cos, sin, positions, slot_mapping, k_pages, v_pages)
    return reference.rope_cache_write(q, k, v, cos, sin, positions, slot_mapping, k_pages, v_pages)


def _fake_tiled_matmul(x: Tensor, codes: Tensor, *_rest: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0] * TILE_COLUMNS))


def _fake_digits(x: Tensor, _perm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, n_chunks = x.shape[0], x.shape[1] // CHUNK_ROWS
    whole = n_rows > FEW_ROWS
    shape = (n_chunks, n_rows) if whole else (n_rows, n_chunks)
    return (
        x.new_empty((*shape, CHUNK_ROWS), dtype=torch.int16)
        if whole
        else x.new_empty((*shape, 2 * CHUNK_ROWS), dtype=torch.int8),
        x.new_empty(shape),
        x.new_empty(shape, dtype=torch.int32),
    )


def _fake_nothing(*_rest: object) -> None:
    return None


def _fake_embedding(table: Tensor, token_ids: Tensor) -> Tensor:
    return table.new_empty((token_ids.shape[0], table.shape[1]), dtype=torch.float32)


def _fake_like_first(first: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


for _name, _cpu, _fake in (
    ("exl2_matmul", _cpu_exl2_matmul, _fake_tiled_matmul),
    ("gptq_matmul", _cpu_gptq_matmul, _fake_tiled_matmul),
    ("digits", _cpu_digits, _fake_digits),
    ("plane_matmul", _cpu_plane_matmul, _fake_nothing),
    ("embedding", _cpu_embedding, _fake_embedding),
    ("add_into", _cpu_add_into, _fake_nothing),
    ("dense_matmul", _cpu_dense_matmul, _fake_nothing),
    ("rms_norm", _cpu_rms_norm, _fake_like_first),
    ("silu_mul", _cpu_silu_mul, _fake_like_first),
    ("silu_mul_into", _cpu_silu_mul_into, _fake_nothing),
    ("rope_cache_write", _cpu_rope_cache_write, _fake_like_first),
):
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"exl2_rag::{_name}", _fake, lib=_library)
cuda_ops.register(_library)

exl2_matmul = torch.ops.exl2_rag.exl2_matmul.default
gptq_matmul = torch.ops.exl2_rag.gptq_matmul.default
digits = torch.ops.exl2_rag.digits.default
plane_matmul = torch.ops.exl2_rag.plane_matmul.default
embedding = torch.ops.exl2_rag.embedding.default
add_into = torch.ops.exl2_rag.add_into.default
dense_matmul = torch.ops.exl2_rag.dense_matmul.default
rms_norm = torch.ops.exl2_rag.rms_norm.default
silu_mul_into = torch.ops.exl2_rag.silu_mul_into.default
silu_mul = torch.ops.exl2_rag.silu_mul.default
rope_cache_write = torch.ops.exl2_rag.rope_cache_write.default

"""The ops of the engine: one typed function each, and the only door to native code.

Each op is a torch operator (namespace `exl2_rag`) with an implementation per device and a fake for tracing. Each has
its namesake in `reference.py`, and a tolerance here that every implementation keeps against it. What row t of a
result holds depends on row t of the input alone: not on T, not on the other rows, not on the threads, because the
order of additions is fixed. Prefix hits, batching and slicing therefore change nothing. Where activations are float32,
on CUDA they may be float16 too; the result has their dtype.

Knows nothing of layers or files. Inputs may be strided, weights and pages may not: copying those would hide a cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import reference, registry
from exl2_rag.llm.kernels.attention_ops import paged_attention, quantise_kv_write, sample
from exl2_rag.llm.kernels.checks import (
    FLOATS,
    check_activations,
    check_devices,
    check_exl2_parts,
    check_float,
    check_gptq_parts,
    product_target,
)
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from exl2_rag.llm.kernels.native import native_available, read_memory, set_num_threads
from exl2_rag.llm.kernels.paged_batch import PagedBatch, Scoring, check_plain_pages
from exl2_rag.llm.kernels.plane_ops import (
    add_into,
    digits,
    embedding,
    exl2_prepare_planes,
    gptq_prepare_planes,
    plane_matmul,
)
from exl2_rag.llm.kernels.sampling_params import RowSampling
from exl2_rag.llm.kernels.weight_memory import WeightMemory
from exl2_rag.llm.kernels.weights import Digits, Exl2Weights, GptqWeights, PlaneWeights

__all__ = [
    "HALF_TOLERANCES",
    "TOLERANCES",
    "Digits",
    "Exl2Weights",
    "GptqWeights",
    "PagedBatch",
    "PlaneWeights",
    "QuantisedPages",
    "RowSampling",
    "Scoring",
    "Tolerance",
    "WeightMemory",
    "add_into",
    "dense_matmul",
    "digits",
    "embedding",
    "exl2_matmul",
    "exl2_prepare",
    "exl2_prepare_planes",
    "gptq_matmul",
    "gptq_prepare",
    "gptq_prepare_planes",
    "native_available",
    "paged_attention",
    "plane_matmul",
    "quantise_kv_write",
    "read_memory",
    "rms_norm",
    "rope_cache_write",
    "sample",
    "set_num_threads",
    "silu_mul",
    "silu_mul_into",
]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an implementation may be from the reference: |a - b| <= absolute + relative * |b|."""

    absolute: float
    relative: float


TOLERANCES: Final[dict[str, Tolerance]] = {
    # Matmuls: float32 sums of K products of numbers around 1.
    "exl2_matmul": Tolerance(2e-5, 2e-5),
    "gptq_matmul": Tolerance(2e-5, 2e-5),
    "dense_matmul": Tolerance(2e-5, 2e-5),
    "plane_matmul": Tolerance(2e-5, 2e-5),  # beside the same whole numbers; what `digits` rounds off is not counted
    "digits": Tolerance(0, 0),
    "embedding": Tolerance(0, 0),
    "add_into": Tolerance(0, 0),
    "rms_norm": Tolerance(2e-6, 2e-6),
    "silu_mul": Tolerance(2e-6, 2e-6),
    "silu_mul_into": Tolerance(2e-6, 2e-6),
    "rope_cache_write": Tolerance(1e-6, 1e-6),
    "paged_attention": Tolerance(5e-6, 5e-6),
    "quantise_kv_write": Tolerance(0, 0),  # of codes and scales; queries as "rope_cache_write"
}

HALF_TOLERANCES: Final[dict[str, Tolerance]] = {
    # On float16 activations (CUDA). The result is rounded to float16 (2^-11 of it at most), and tensor cores add
    # sixteen products at a time, cutting off below about 2^-23 of the largest: with some hundred around 1, 1e-5 a step.
    "exl2_matmul": Tolerance(2e-4, 6e-4),
    "gptq_matmul": Tolerance(2e-4, 6e-4),
}


def exl2_prepare(
    q_weight: Tensor,
    q_groups: Tensor,
    q_scale: Tensor,
    q_scale_max: Tensor,
    q_invperm: Tensor,
    *,
    prescale: float = 1.0,
) -> Exl2Weights:
    """Repack an EXL2 matrix for `exl2_matmul`; once, at load. The tensors given are left alone.

    Args:
        q_weight: [R, N] int32, packed codes as in the file; N a multiple of 32.
        q_groups: [2 * G] int16, (bits, first packed row) of each group.
        q_scale: [G, N/8] int32, a nibble (scale - 1) per group and column.
        q_scale_max: [G] float16.
        q_invperm: [K] int32, the stored row of each input feature.
        prescale: a constant of the layer that multiplies the weights.

    Raises:
        DTypeError, ShapeError: the tensors are not one EXL2 matrix.
    """
    check_exl2_parts("exl2_prepare", q_weight, q_groups, q_scale, q_scale_max, q_invperm)
    return reference.exl2_prepare(q_weight, q_groups, q_scale, q_scale_max, q_invperm, prescale=prescale)


def exl2_matmul(x: Tensor, weights: Exl2Weights) -> Tensor:
    """Multiply activations by an EXL2 matrix without storing the dequantised weights.

    Args:
        x: [T, K] float32.
        weights: a K x N matrix from `exl2_prepare`. N is the padded width. Not modified.

    Returns:
        [T, N] float32. The weights are exactly the format's float16 values; sums are float32.

    Raises:
        ShapeError, DTypeError, DeviceError: `x` does not fit `weights`.
    """
    check_float("exl2_matmul", "x", x, 2)
    if x.shape[1] != weights.in_features:
        raise ShapeError(f"exl2_matmul: x must be [T, {weights.in_features}], it is {list(x.shape)}")
    check_devices("exl2_matmul", x, weights.codes)
    result: Tensor = registry.exl2_matmul(
        x, weights.codes, weights.scales, weights.group_scales, weights.groups, weights.perm
    )
    return result


def gptq_prepare(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    prescale: float = 1.0,
    zero_offset: int = 1,
) -> GptqWeights:
    """Repack a 4-bit GPTQ matrix for `gptq_matmul`; once, at load. The tensors given are left alone.

    Args:
        qweight: [K/8, N] int32, codes of eight rows a word; N a multiple of 32.
        qzeros: [G, N/8] int32, zero points of eight columns a word.
        scales: [G, N] float16, bfloat16 or float32; rounded to float16.
        g_idx: [K] int32, the group of each row. Without it, or all zero, groups are equal powers of two.
        prescale: a constant of the layer that multiplies the weights.
        zero_offset: what is added to a stored zero point: 1, or 0 in files of `checkpoint_format` "gptq_v2".

    Raises:
        DTypeError, ShapeError: the tensors are not one GPTQ matrix.
    """
    check_gptq_parts("gptq_prepare", qweight, qzeros, scales, g_idx)
    return reference.gptq_prepare(qweight, qzeros, scales, g_idx, prescale=prescale, zero_offset=zero_offset)


def gptq_matmul(x: Tensor, weights: GptqWeights) -> Tensor:
    """Multiply activations by a GPTQ matrix without storing the dequantised weights.

    Args:
        x: [T, K] float32.
        weights: a K x N matrix from `gptq_prepare`. Not modified.

    Returns:
        [T, N] float32. The weights are exactly the format's float16 values; sums are float32.

    Raises:
        ShapeError, DTypeError, DeviceError: `x` does not fit `weights`.
    """
    check_float("gptq_matmul", "x", x, 2)
    if x.shape[1] != weights.in_features:
        raise ShapeError(f"gptq_matmul: x must be [T, {weights.in_features}], it is {list(x.shape)}")
    check_devices("gptq_matmul", x, weights.codes)
    result: Tensor = registry.gptq_matmul(x, weights.codes, weights.scales, weights.zeros, weights.row_groups)
    return result


def dense_matmul(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, add_to: Tensor | None = None) -> Tensor:
    """x times the transpose of a plain matrix.

    Args:
        x: [T, K] float32.
        weight: [N, K] float32, float16 or bfloat16, contiguous; used as it is stored, never widened as a whole.
        bias: [N] float32, added to each row.
        add_to: [T, N] float32, contiguous: the result is added to it in place, and it is returned.

    Returns:
        [T, N] float32, summed in float32.

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not fit.
    """
    check_activations("dense_matmul", "x", x, 2)
    if weight.dtype not in FLOATS:
        raise DTypeError(f"dense_matmul: weight must be float32, float16 or bfloat16, it is {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or not weight.is_contiguous():
        raise ShapeError(
            f"dense_matmul: weight must be [N, {x.shape[1]}] and contiguous; its shape is {list(weight.shape)}, "
            f"its strides {list(weight.stride())}"
        )
    check_devices("dense_matmul", x, weight)
    y = product_target("dense_matmul", x, x.shape[0], weight.shape[0], bias, add_to)
    registry.dense_matmul(y, x, weight, bias, add_to is not None)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension.

    Args:
        x: [T, C] float32.
        weight: [C] float32.
        eps: added to the mean square.

    Returns:
        [T, C] float32.

    Raises:
        ShapeError, DTypeError, DeviceError: the two do not fit.
    """
    check_activations("rms_norm", "x", x, 2)
    check_float("rms_norm", "weight", weight, 1)
    if weight.shape[0] != x.shape[1]:
        raise ShapeError(f"rms_norm: weight must be [{x.shape[1]}], it is {list(weight.shape)}")
    check_devices("rms_norm", x, weight)
    result: Tensor = registry.rms_norm(x, weight, eps)
    return result


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, element by element.

    Args:
        gate, up: [T, I] float32.

    Returns:
        [T, I] float32.

    Raises:
        ShapeError, DTypeError, DeviceError: the two do not fit.
    """
    check_activations("silu_mul", "gate", gate, 2)
    check_activations("silu_mul", "up", up, 2)
    if gate.shape != up.shape:
        raise ShapeError(f"silu_mul: gate is {list(gate.shape)}, up is {list(up.shape)}; they must be alike")
    check_devices("silu_mul", gate, up)
    result: Tensor = registry.silu_mul(gate, up)
    return result


def silu_mul_into(gate: Tensor, up: Tensor) -> Tensor:
    """As `silu_mul`, but the result takes the place of `gate`, contiguous, which is returned: one buffer less.

    Raises:
        ShapeError, DTypeError, DeviceError: the two do not fit.
    """
    check_float("silu_mul_into", "gate", gate, 2)
    check_float("silu_mul_into", "up", up, 2)
    if gate.shape != up.shape or not gate.is_contiguous():
        raise ShapeError(
            f"silu_mul_into: gate must be contiguous and like up; gate is {list(gate.shape)} with strides "
            f"{list(gate.stride())}, up is {list(up.shape)}"
        )
    check_devices("silu_mul_into", gate, up)
    registry.silu_mul_into(gate, up)
    return gate


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
    """Rotate q and k by their positions and write k and v into the cache.

    Args:
        q: [T, H, D] float32. k, v: [T, KH, D] float32.
        cos, sin: [S, R/2] float32, a row per position. The first R of D numbers are rotated, number i of the first
            half of R with number i of the second (NeoX layout).
        positions: [T] int64, each less than S.
        slot_mapping: [T] int64, page * PS + row for each token; all different.
        k_pages, v_pages: [P, PS, KH, D] float32, float16 or bfloat16; written to.

    Returns:
        [T, H, D] float32, q rotated.

    Raises:
        ShapeError, DTypeError, DeviceError: a tensor does not fit, or a position or slot is out of range.
    """
    op = "rope_cache_write"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_activations(op, name, tensor, 3)
        if tensor.dtype != q.dtype:
            raise DTypeError(f"{op}: q, k and v must be of one dtype, {name} is {tensor.dtype} and q is {q.dtype}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_float(op, name, tensor, 2)
    for name, tensor in (("positions", positions), ("slot_mapping", slot_mapping)):
        if tensor.dtype != torch.int64:
            raise DTypeError(f"{op}: {name} must be int64, it is {tensor.dtype}")
        if tensor.shape != q.shape[:1]:
            raise ShapeError(f"{op}: {name} must be [{q.shape[0]}], it is {list(tensor.shape)}")
    check_plain_pages(op, k_pages, v_pages)
    wanted = (q.shape[0], k_pages.shape[2], k_pages.shape[3])
    if k.shape != wanted or v.shape != wanted or q.shape[2] != wanted[2]:
        raise ShapeError(
            f"{op}: with q {list(q.shape)} and pages {list(k_pages.shape)}, k and v must be {list(wanted)} and D "
            f"{wanted[2]}; k is {list(k.shape)}, v is {list(v.shape)}"
        )
    if cos.shape != sin.shape or cos.shape[1] * 2 > q.shape[2]:
        raise ShapeError(
            f"{op}: cos and sin must be [S, R/2] with R at most {q.shape[2]}, "
            f"they are {list(cos.shape)} and {list(sin.shape)}"
        )
    check_devices(op, q, k, v, cos, sin, positions, slot_mapping, k_pages, v_pages)
    result: Tensor = registry.rope_cache_write(q, k, v, cos, sin, positions, slot_mapping, k_pages, v_pages)
    return result

"""The ops of the precision "fast": activations as whole numbers, weights as planes. Given out by `ops.py`.

`digits` turns activations into whole numbers of 15 bits, 32 stored rows to a scale; `plane_matmul` multiplies those by
the codes in exact integer arithmetic and scales the sums in float32. The fixed order of additions holds here too: row t
of a result depends on row t of the input alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.errors import ShapeError
from exl2_rag.llm.kernels import checks, cpu_ops, native, reference, reference_planes, registry
from exl2_rag.llm.kernels.weight_memory import WeightMemory
from exl2_rag.llm.kernels.weights import CHUNK_ROWS, Digits, PlaneWeights


def exl2_prepare_planes(
    q_weight: Tensor,
    q_groups: Tensor,
    q_scale: Tensor,
    q_scale_max: Tensor,
    q_invperm: Tensor,
    *,
    prescale: float = 1.0,
    memory: WeightMemory | None = None,
) -> PlaneWeights:
    """Repack an EXL2 matrix for `plane_matmul`; once, at load. Arguments and errors as for `ops.exl2_prepare`.

    `memory` is where the codes go, the same for all matrices of a model; None: memory of their own.
    """
    checks.check_exl2_parts("exl2_prepare_planes", q_weight, q_groups, q_scale, q_scale_max, q_invperm)
    groups, in_features = checks.exl2_groups("exl2_prepare_planes", q_weight, q_groups, q_scale, q_invperm)
    out_features = q_weight.shape[1]
    table = torch.tensor([[group.bits, group.rows] for group in groups], dtype=torch.int32)
    library = native.library()
    if library is None:
        planes, scales = reference_planes.exl2_planes(q_weight, q_scale, groups)
    else:
        planes, scales = cpu_ops.exl2_planes(library, q_weight, q_scale, table, memory or WeightMemory())
    return PlaneWeights(
        planes=planes,
        scales=scales,
        group_scales=reference.exl2_group_scales(q_scale_max, prescale),
        zeros=torch.empty(0, dtype=torch.uint8),
        groups=table,
        perm=reference.exl2_perm(q_invperm),
        in_features=in_features,
        out_features=out_features,
    )


def gptq_prepare_planes(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    prescale: float = 1.0,
    zero_offset: int = 1,
    memory: WeightMemory | None = None,
) -> PlaneWeights | None:
    """Repack a 4-bit GPTQ matrix for `plane_matmul`; arguments and errors as for `ops.gptq_prepare`.

    Rows are sorted by group. None if a group's rows are no multiple of 32: such a matrix has no planes, and is to be
    multiplied by `ops.gptq_matmul`.
    """
    checks.check_gptq_parts("gptq_prepare_planes", qweight, qzeros, scales, g_idx)
    in_features, out_features = qweight.shape[0] * 8, qweight.shape[1]
    row_groups = reference.gptq_row_groups(g_idx, in_features, scales.shape[0]).to(torch.int64)
    counts = torch.bincount(row_groups, minlength=scales.shape[0])
    if bool((counts % CHUNK_ROWS).any()):
        return None
    used = torch.nonzero(counts).flatten()
    order = torch.argsort(row_groups, stable=True).to(torch.int32)
    perm = order[:0].clone() if torch.equal(order, torch.arange(in_features, dtype=torch.int32)) else order
    library = native.library()
    if library is None:
        planes = reference_planes.gptq_planes(qweight, perm)
    else:
        planes = cpu_ops.gptq_planes(library, qweight, perm, memory or WeightMemory())
    tiled_scales, tiled_zeros = reference.gptq_tables(qzeros, scales, prescale=prescale, zero_offset=zero_offset)
    return PlaneWeights(
        planes=planes,
        scales=tiled_scales[:, used].contiguous(),
        group_scales=torch.empty(0, dtype=torch.float16),
        zeros=tiled_zeros[:, used].contiguous(),
        groups=torch.stack((torch.full_like(used, 4), counts[used]), dim=1).to(torch.int32),
        perm=perm,
        in_features=in_features,
        out_features=out_features,
    )


def digits(x: Tensor, perm: Tensor) -> Digits:
    """Activations as whole numbers, their columns in the stored order of a matrix.

    Args:
        x: [T, K] float32, K a multiple of 32.
        perm: [K] int32, the column of x that each stored row takes; empty: as they are.

    Raises:
        ShapeError, DTypeError, DeviceError: the two do not fit.
    """
    checks.check_float("digits", "x", x, 2)
    if x.shape[1] % CHUNK_ROWS or perm.shape not in ((0,), (x.shape[1],)):
        raise ShapeError(
            f"digits: x must be [T, K] with K a multiple of {CHUNK_ROWS} and perm [K] or empty; "
            f"they are {list(x.shape)} and {list(perm.shape)}"
        )
    checks.check_devices("digits", x, perm)
    return Digits(*registry.digits(x, perm))


def plane_matmul(
    x: Digits,
    weights: PlaneWeights,
    *,
    width: int | None = None,
    bias: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """Multiply whole-number activations by a matrix in planes.

    Args:
        x: T rows from `digits`, made with the matrix's `perm`.
        weights: a K x N matrix. Not modified.
        width: columns wanted, the first of N; all by default.
        bias: [width] float32, added to each row.
        add_to: [T, width] float32, contiguous: the result is added to it in place, and it is returned.

    Returns:
        [T, width] float32. Sums of a chunk of 32 rows are exact, the rest is float32.

    Raises:
        ShapeError, DTypeError: the tensors do not fit.
    """
    if x.in_features != weights.in_features:
        raise ShapeError(f"plane_matmul: x must have {weights.in_features} columns, it has {x.in_features}")
    columns = weights.out_features if width is None else width
    if not 0 <= weights.out_features - columns < 32:
        raise ShapeError(f"plane_matmul: width must be {weights.out_features} or up to 31 less, it is {columns}")
    y = checks.product_target("plane_matmul", x.scales, x.n_rows, columns, bias, add_to)
    registry.plane_matmul(
        y,
        x.digits,
        x.scales,
        x.sums,
        weights.planes,
        weights.scales,
        weights.group_scales,
        weights.zeros,
        weights.groups,
        bias,
        add_to is not None,
    )
    return y


def embedding(table: Tensor, token_ids: Tensor) -> Tensor:
    """Look up rows of an embedding table.

    Args:
        table: [V, C] float32, float16 or bfloat16, contiguous.
        token_ids: [T] int64, each less than V.

    Returns:
        [T, C] float32.

    Raises:
        ShapeError, DTypeError, DeviceError: the two do not fit, or an id is out of range.
    """
    checks.check_dtype("embedding", "table", table, checks.FLOATS)
    checks.check_dtype("embedding", "token_ids", token_ids, (torch.int64,))
    if table.dim() != 2 or token_ids.dim() != 1 or not table.is_contiguous():
        raise ShapeError(
            f"embedding: table must be [V, C] and contiguous, token_ids [T]; they are {list(table.shape)} and "
            f"{list(token_ids.shape)}"
        )
    checks.check_devices("embedding", table, token_ids)
    result: Tensor = registry.embedding(table, token_ids)
    return result


def add_into(y: Tensor, x: Tensor) -> None:
    """y += x, element by element.

    Args:
        y: float32, contiguous; written to.
        x: float32, of the same shape.

    Raises:
        ShapeError, DTypeError, DeviceError: the two do not fit.
    """
    checks.check_dtype("add_into", "y", y, (torch.float32,))
    checks.check_dtype("add_into", "x", x, (torch.float32,))
    if y.shape != x.shape or not y.is_contiguous():
        raise ShapeError(f"add_into: y must be {list(x.shape)} and contiguous, it is {list(y.shape)}")
    checks.check_devices("add_into", y, x)
    registry.add_into(y, x)

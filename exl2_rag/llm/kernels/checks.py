"""What the ops check before they call a kernel. Messages name the op, what it expects and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.errors import DeviceError, DTypeError, ShapeError
from exl2_rag.llm.kernels import work_memory
from exl2_rag.llm.kernels.weights import TILE_COLUMNS, Group, parse_groups

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_float(op: str, name: str, tensor: Tensor, dims: int) -> None:
    """A float32 tensor of `dims` dimensions."""
    if tensor.dtype != torch.float32:
        raise DTypeError(f"{op}: {name} must be float32, it is {tensor.dtype}; convert it before the call")
    if tensor.dim() != dims:
        raise ShapeError(f"{op}: {name} must have {dims} dimensions, its shape is {list(tensor.shape)}")


def check_activations(op: str, name: str, tensor: Tensor, dims: int) -> None:
    """A float32 tensor, on CUDA float32 or float16, of `dims` dimensions."""
    if tensor.device.type != "cuda":
        check_float(op, name, tensor, dims)
    elif tensor.dtype not in (torch.float32, torch.float16):
        raise DTypeError(f"{op}: {name} must be float32 or float16, it is {tensor.dtype}; convert it before the call")
    elif tensor.dim() != dims:
        raise ShapeError(f"{op}: {name} must have {dims} dimensions, its shape is {list(tensor.shape)}")


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """A tensor of one of the dtypes."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(one).removeprefix("torch.") for one in allowed)
        raise DTypeError(f"{op}: {name} must be {wanted}, it is {tensor.dtype}")


def check_devices(op: str, first: Tensor, *others: Tensor) -> None:
    """All tensors on the device of the first."""
    for other in others:
        if other.device != first.device:
            raise DeviceError(f"{op}: all tensors must be on {first.device}, one is on {other.device}")


def check_exl2_parts(
    op: str, q_weight: Tensor, q_groups: Tensor, q_scale: Tensor, q_scale_max: Tensor, q_invperm: Tensor
) -> None:
    """The five tensors of an EXL2 matrix, as far as they can be judged without reading the group table."""
    wanted = {
        "q_weight": (q_weight, torch.int32, 2),
        "q_groups": (q_groups, torch.int16, 1),
        "q_scale": (q_scale, torch.int32, 2),
        "q_scale_max": (q_scale_max, torch.float16, 1),
        "q_invperm": (q_invperm, torch.int32, 1),
    }
    for name, (tensor, dtype, dims) in wanted.items():
        if tensor.dtype != dtype or tensor.dim() != dims:
            found = f"{tensor.dtype} of shape {list(tensor.shape)}"
            raise (DTypeError if tensor.dtype != dtype else ShapeError)(
                f"{op}: {name} must be {dtype} with {dims} dimension(s), it is {found}"
            )
    if q_weight.shape[1] % TILE_COLUMNS:
        raise ShapeError(f"{op}: q_weight must have a multiple of 32 columns, it has {q_weight.shape[1]}")
    if q_scale_max.shape[0] * 2 != q_groups.shape[0]:
        raise ShapeError(
            f"{op}: q_groups describes {q_groups.shape[0] // 2} groups, q_scale_max {q_scale_max.shape[0]}"
        )
    check_devices(op, q_weight, q_groups, q_scale, q_scale_max, q_invperm)


def exl2_groups(
    op: str, q_weight: Tensor, q_groups: Tensor, q_scale: Tensor, q_invperm: Tensor
) -> tuple[list[Group], int]:
    """The groups that the table describes and the rows they have together, checked against the other tensors."""
    packed_rows, out_features = q_weight.shape
    try:
        groups = parse_groups([number & 0xFFFF for number in q_groups.tolist()], packed_rows)
    except ValueError as error:
        raise ShapeError(f"{op}: {error}; the tensors are not one EXL2 matrix") from error
    in_features = sum(group.rows for group in groups)
    if q_invperm.shape != (in_features,) or q_scale.shape != (len(groups), out_features // 8):
        raise ShapeError(
            f"{op}: q_groups describes {in_features} rows in {len(groups)} groups and q_weight has "
            f"{out_features} columns, but q_invperm is {list(q_invperm.shape)} and q_scale {list(q_scale.shape)}"
        )
    return groups, in_features


def check_gptq_parts(op: str, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None) -> None:
    """The tensors of a 4-bit GPTQ matrix."""
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        check_dtype(op, name, tensor, (torch.int32,))
    if scales.dtype not in FLOATS:
        raise DTypeError(f"{op}: scales must be floating point, they are {scales.dtype}")
    if qweight.dim() != 2 or scales.dim() != 2 or qweight.shape[1] % TILE_COLUMNS:
        raise ShapeError(
            f"{op}: qweight must be [K/8, N] with N a multiple of 32, it is {list(qweight.shape)}; "
            f"scales must be [G, N], they are {list(scales.shape)}"
        )
    n_groups, out_features = scales.shape
    if out_features != qweight.shape[1] or qzeros.shape != (n_groups, out_features // 8):
        raise ShapeError(
            f"{op}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and "
            f"scales {list(scales.shape)} do not describe one matrix"
        )
    if g_idx is not None and (
        g_idx.shape != (qweight.shape[0] * 8,) or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < n_groups
    ):
        raise ShapeError(f"{op}: g_idx must be [{qweight.shape[0] * 8}] with values 0 to {n_groups - 1}")
    check_devices(op, qweight, qzeros, scales)


def product_target(op: str, x: Tensor, n_rows: int, width: int, bias: Tensor | None, add_to: Tensor | None) -> Tensor:
    """Where a product [n_rows, width] with `x` goes: `add_to`, checked like `bias`, or new memory where `x` is."""
    if bias is not None:
        check_float(op, "bias", bias, 1)
        check_devices(op, x, bias)
        if bias.shape[0] != width or not bias.is_contiguous():
            raise ShapeError(f"{op}: bias must be [{width}] and contiguous, it is {list(bias.shape)}")
    if add_to is None:
        if type(x) is Tensor and x.device.type == "cpu":  # fake tensors have no memory
            return work_memory.empty((n_rows, width), torch.float32)
        return x.new_empty((n_rows, width), dtype=torch.float32)
    check_float(op, "add_to", add_to, 2)
    check_devices(op, x, add_to)
    if add_to.shape != (n_rows, width) or not add_to.is_contiguous():
        raise ShapeError(f"{op}: add_to must be [{n_rows}, {width}] and contiguous, it is {list(add_to.shape)}")
    return add_to

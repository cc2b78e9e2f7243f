"""Ops for making EXL2 matrices; part of the door that is `ops.py`. C++ where there is a library, else plain torch.

Not torch operators: nothing of a forward pass calls them, and on a card torch does the same work well enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.errors import ShapeError
from exl2_rag.llm.kernels import cpu_ops, native
from exl2_rag.llm.kernels.checks import check_devices, check_float
from exl2_rag.llm.kernels.cpu_ops import structure
from exl2_rag.llm.kernels.weights import EXL2_WIDTHS

_RoundingCosts = structure(
    "RoundingCosts", "*:x l:rows l:columns *:row_weights *:steps l:n_steps i:bits i:peaks *:costs"
)
_GptqRows = structure(
    "GptqRows", "*:x l:rows l:columns *:upper l:upper_stride *:steps i:bits i:feedback *:codes *:values *:errors"
)


def rounding_costs(x: Tensor, row_weights: Tensor | None, steps: Tensor, bits: int) -> Tensor:
    """What rounding a group of weights with each of several steps costs each column.

    Args:
        x: [R, N] float32, the weights.
        row_weights: [R] float32, what the square of an error costs in each row; None: errors count to the power 3.5,
            which weighs large ones more, and all rows alike.
        steps: [S, N] float32; where a step is 0 everything rounds to 0.
        bits: width of the codes.

    Returns:
        [S, N] float32.

    Raises:
        ShapeError, DTypeError, DeviceError: a tensor does not fit.
    """
    for name, tensor in (("x", x), ("steps", steps)):
        check_float("rounding_costs", name, tensor, 2)
    _check_bits("rounding_costs", bits)
    check_devices("rounding_costs", x, steps, *([] if row_weights is None else [row_weights]))
    if steps.shape[1] != x.shape[1] or (row_weights is not None and row_weights.shape != x.shape[:1]):
        raise ShapeError(
            f"rounding_costs: steps must be [S, {x.shape[1]}] and row_weights [{x.shape[0]}], they are "
            f"{list(steps.shape)} and {None if row_weights is None else list(row_weights.shape)}"
        )
    library = native.library() if x.device.type == "cpu" else None
    if library is None:
        return reference_rounding_costs(x, row_weights, steps, bits)
    x, steps = x.contiguous(), steps.contiguous()
    weights = x.new_ones(x.shape[0]) if row_weights is None else row_weights.contiguous()
    costs = torch.empty_like(steps)
    rows, columns = x.shape
    arguments = _RoundingCosts(
        x.data_ptr(),
        rows,
        columns,
        weights.data_ptr(),
        steps.data_ptr(),
        steps.shape[0],
        bits,
        row_weights is None,
        costs.data_ptr(),
    )
    cpu_ops.call(library, "rounding_costs", arguments)
    return costs


def gptq_rows(
    x: Tensor, upper: Tensor, steps: Tensor, bits: int, *, feedback: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the rows of a group one after the other, each making up for the errors of those before it.

    Args:
        x: [R, N] float32, the weights.
        upper: [R, R] float32, upper triangular, its rows contiguous: the group's part of the Hessian's factor.
        steps: [N] float32, each the value of a float16.
        bits: width of the codes.
        feedback: False rounds each row to the nearest.

    Returns:
        codes [R, N] uint8; the weights they mean, [R, N] float32, each the value of a float16; and errors [R, N]
        float32, divided by U's diagonal, for the rows after the group.

    Raises:
        ShapeError, DTypeError, DeviceError: a tensor does not fit.
    """
    for name, tensor, dims in (("x", x, 2), ("upper", upper, 2), ("steps", steps, 1)):
        check_float("gptq_rows", name, tensor, dims)
    _check_bits("gptq_rows", bits)
    check_devices("gptq_rows", x, upper, steps)
    rows, columns = x.shape
    if upper.shape != (rows, rows) or steps.shape != (columns,):
        raise ShapeError(
            f"gptq_rows: upper must be [{rows}, {rows}] and steps [{columns}], they are {list(upper.shape)} and "
            f"{list(steps.shape)}"
        )
    library = native.library() if x.device.type == "cpu" else None
    if library is None:
        return reference_gptq_rows(x, upper, steps, bits, feedback=feedback)
    x, steps = x.contiguous(), steps.contiguous()
    upper = upper if upper.stride(1) == 1 else upper.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    values, errors = torch.empty_like(x), torch.empty_like(x)
    arguments = _GptqRows(
        x.data_ptr(),
        rows,
        columns,
        upper.data_ptr(),
        upper.stride(0),
        steps.data_ptr(),
        bits,
        feedback,
        codes.data_ptr(),
        values.data_ptr(),
        errors.data_ptr(),
    )
    cpu_ops.call(library, "gptq_rows", arguments)
    return codes, values, errors


def reference_rounding_costs(x: Tensor, row_weights: Tensor | None, steps: Tensor, bits: int) -> Tensor:
    """`rounding_costs` in plain torch."""
    costs = torch.empty_like(steps)
    for index, step in enumerate(steps):
        error = (_whole_numbers(x, step, bits) * step - x).abs_()
        if row_weights is None:  # error ** 3.5, many times faster than a general power
            costs[index] = (error.sqrt() * error * error.square()).sum(0)
        else:
            costs[index] = (error.square_() * row_weights[:, None]).sum(0)
    return costs


def reference_gptq_rows(
    x: Tensor, upper: Tensor, steps: Tensor, bits: int, *, feedback: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """`gptq_rows` in plain torch."""
    x = x.clone()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    values, errors = torch.empty_like(x), torch.empty_like(x)
    diagonal = upper.diagonal()
    for row in range(x.shape[0]):
        whole = _whole_numbers(x[row], steps, bits)
        values[row] = (whole * steps).to(torch.float16)
        codes[row] = (whole + (1 << (bits - 1))).to(torch.uint8)
        errors[row] = (x[row] - values[row]) / diagonal[row]
        if feedback and row + 1 < x.shape[0]:
            x[row + 1 :].addr_(upper[row, row + 1 :], errors[row], alpha=-1)
    return codes, values, errors


def _whole_numbers(x: Tensor, step: Tensor, bits: int) -> Tensor:
    zero = 1 << (bits - 1)
    usable = step != 0
    return torch.round(x / torch.where(usable, step, 1.0)).mul_(usable).clamp_(-zero, zero - 1)


def _check_bits(op: str, bits: int) -> None:
    if bits not in EXL2_WIDTHS:
        raise ShapeError(f"{op}: bits must be one of {list(EXL2_WIDTHS)}, they are {bits}")

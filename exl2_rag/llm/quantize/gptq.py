"""Quantises one matrix row by row, each row making up for the errors of those before it (GPTQ).

Rows are taken in the order of the Hessian's diagonal, group by group; a group's scales are found on the weights as the
rows before have left them. Knows one matrix and its inputs' second moments; not models, files or budgets.

Source: GPTQ (Frantar et al. 2022), with the groups, scales and order published with ExLlamaV2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.errors import CalibrationError
from exl2_rag.llm.checkpoint.exl2_format import pack
from exl2_rag.llm.kernels.quantise_ops import gptq_rows
from exl2_rag.llm.kernels.weights import CHUNK_ROWS
from exl2_rag.llm.quantize.hessian import HessianFactor
from exl2_rag.llm.quantize.rtn import QuantisationPlan, padded
from exl2_rag.llm.quantize.scales import GroupScales, search_scales

ScaleSearch = Callable[[Tensor, Tensor, int], GroupScales]
"""Scales for (group [rows, N], row weights [rows], bits)."""


@dataclass(frozen=True, slots=True)
class QuantisedMatrix:
    """A matrix on the EXL2 grid.

    Attributes:
        parts: the tensors on disk, as `exl2_format.pack` gives them, on the CPU.
        weight: [out, in] float16, exactly what a reader reconstructs, on the device of the source.
    """

    parts: dict[str, Tensor]
    weight: Tensor


def unweighted(group: Tensor, row_weights: Tensor, bits: int) -> GroupScales:
    """ExLlamaV2's scale search, which does not look at the inputs."""
    del row_weights
    return search_scales(group, bits)


def quantise_matrix(
    weight: Tensor,
    factor: HessianFactor,
    plan: QuantisationPlan,
    *,
    search: ScaleSearch = unweighted,
    feedback: bool = True,
) -> QuantisedMatrix:
    """Quantise a matrix for the inputs that a factor describes.

    Args:
        weight: [out, in] floating point; `in` a multiple of 32. `out` is padded to a multiple of 32.
        factor: of the `in` inputs, on the device of the weight.
        plan: widths and groups.
        search: finds the scales of a group.
        feedback: let rows make up for the errors of those before; False rounds to the nearest, in the same order.

    Raises:
        CalibrationError: the weight is not finite, or too wide for its inputs.
    """
    out_features, in_features = weight.shape
    if in_features % CHUNK_ROWS or factor.perm.shape[0] != in_features:
        raise CalibrationError(
            f"a matrix of {in_features} inputs cannot be quantised: EXL2 needs a multiple of {CHUNK_ROWS}, and second "
            f"moments of as many inputs (they are of {factor.perm.shape[0]})"
        )
    stored = torch.zeros((in_features, padded(out_features)), dtype=torch.float32, device=weight.device)
    stored[:, :out_features] = weight.to(torch.float32).T[factor.perm]
    if not bool(torch.isfinite(stored).all()):
        raise CalibrationError("a weight is not finite; the source is damaged and cannot be quantised")
    row_weights = factor.row_weights
    codes: list[Tensor] = []
    values: list[Tensor] = []
    scales: list[Tensor] = []
    scale_max: list[Tensor] = []
    groups = plan.groups(in_features)
    first = 0
    for bits, rows in groups:
        last = first + rows
        group, upper = stored[first:last], factor.upper[first:last]
        found = search(group, row_weights[first:last], bits)
        scales.append(found.scale.cpu())
        scale_max.append(found.scale_max.cpu())
        of_group, means, errors = gptq_rows(group, upper[:, first:last], found.column_scale, bits, feedback=feedback)
        codes.append(of_group.cpu())
        values.append(means.to(torch.float16))
        if feedback and last < in_features:
            stored[last:].addmm_(upper[:, last:].T, errors, alpha=-1)
        first = last
    invperm = factor.invperm
    parts = pack(torch.cat(codes), torch.stack(scales), torch.stack(scale_max), groups, invperm.cpu())
    restored = torch.cat(values)[invperm.to(torch.int64)].T[:out_features].contiguous()
    return QuantisedMatrix(parts, restored)


def output_error(weight: Tensor, quantised: Tensor, hessian: Tensor) -> float:
    """Error of the products as a share of the products themselves: tr(D H D^T) / tr(W H W^T), D the difference.

    Args:
        weight, quantised: [out, in] floating point.
        hessian: [in, in], undamped, in the order of the inputs.
    """
    exact = weight.to(torch.float32)
    difference = quantised.to(torch.float32) - exact
    whole = ((exact @ hessian) * exact).sum(dtype=torch.float64)
    part = ((difference @ hessian) * difference).sum(dtype=torch.float64)
    return float(part / whole) if float(whole) > 0 else 0.0

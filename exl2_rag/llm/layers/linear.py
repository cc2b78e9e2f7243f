"""Linear layers, whatever the weights are stored as: EXL2, GPTQ or plain.

The one place that knows how a layer's tensors in a checkpoint become something that multiplies. Widths come from the
model's config; a quantised matrix may be up to 31 columns wider, and those columns never leave this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.checkpoint.gptq_format import zero_offset
from exl2_rag.llm.kernels import ops
from exl2_rag.llm.layers.activations import Activations

PAD_COLUMNS = 32
"""Quantised matrices are padded to a multiple of this many columns."""

EXL2_PARTS = ("q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm")
_GPTQ_PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What the model expects of one linear layer: y = x W + b, W of [in_features, out_features]."""

    key: str
    in_features: int
    out_features: int
    bias: bool = False


class Linear(Protocol):
    """A layer that multiplies. Row t of the result depends on row t of the input alone."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""

    def __call__(self, x: Activations, *, add_to: Tensor | None = None) -> Tensor:
        """[T, in_features] float32 to [T, out_features] float32.

        With `add_to` [T, out_features] the result is added to it in place, and it is returned.
        """


class PlaneLinear:
    """An EXL2 or GPTQ matrix for products of whole numbers (precision "fast"), kept packed.

    `bias` is [out_features] float32 or None.
    """

    def __init__(self, weights: ops.PlaneWeights, bias: Tensor | None, out_features: int) -> None:
        self.weights = weights
        self.bias = bias
        self.out_features = out_features

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.weights.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Activations, *, add_to: Tensor | None = None) -> Tensor:
        """[T, in_features] float32 to [T, out_features] float32."""
        digits = x.digits(self.weights.perm)
        return ops.plane_matmul(digits, self.weights, width=self.out_features, bias=self.bias, add_to=add_to)


class QuantisedLinear:
    """An EXL2 or GPTQ matrix, kept packed.

    `bias` is [out_features] float32 or None; `matmul` multiplies by `weights` and gives the padded width.
    """

    def __init__(
        self,
        weights: ops.Exl2Weights | ops.GptqWeights,
        bias: Tensor | None,
        out_features: int,
        matmul: Callable[[Tensor], Tensor],
    ) -> None:
        self.weights = weights
        self.bias = bias
        self.out_features = out_features
        self._matmul = matmul

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.weights.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Activations, *, add_to: Tensor | None = None) -> Tensor:
        """[T, in_features] float32 to [T, out_features] float32."""
        result = self._matmul(x.x)[:, : self.out_features]
        if self.bias is not None:
            result = result + self.bias
        return result if add_to is None else add_to.add_(result)


class DenseLinear:
    """A plain matrix [out_features, in_features], kept in the dtype of the file; `bias` is float32 or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Activations, *, add_to: Tensor | None = None) -> Tensor:
        """[T, in_features] float32 to [T, out_features] float32."""
        return ops.dense_matmul(x.x, self.weight, bias=self.bias, add_to=add_to)


def share_input_order(layers: Iterable[Linear]) -> None:
    """Let layers that read the same input in the same order know it, so that `Activations` serves them together."""
    seen: list[Tensor] = []
    for layer in layers:
        if isinstance(layer, PlaneLinear):
            perm = layer.weights.perm
            same = next((other for other in seen if torch.equal(other, perm)), None)
            if same is None:
                seen.append(perm)
            else:
                layer.weights = replace(layer.weights, perm=same)


def check_linear(checkpoint: Checkpoint, spec: LinearSpec) -> list[str]:
    """Check from the headers alone that the layer is there in the wanted size; returns the names of its tensors.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is there against expectation.
    """
    kind = checkpoint.kind(spec.key)
    if kind is None:
        raise CheckpointError(
            f"the checkpoint has no weights for '{spec.key}': expected {spec.key}.weight, or the tensors of a "
            f"quantised layer, for a matrix of {spec.in_features} inputs and {spec.out_features} outputs; "
            "the model is incomplete, or its config.json belongs to another one"
        )
    padded = -(-spec.out_features // PAD_COLUMNS) * PAD_COLUMNS
    if kind == "exl2":
        names = [f"{spec.key}.{part}" for part in EXL2_PARTS]
        check_shape(checkpoint, f"{spec.key}.q_weight", (None, padded))
        check_shape(checkpoint, f"{spec.key}.q_invperm", (spec.in_features,))
    elif kind == "gptq":
        names = [f"{spec.key}.{part}" for part in _GPTQ_PARTS]
        names += [f"{spec.key}.g_idx"] * checkpoint.has(f"{spec.key}.g_idx")
        check_shape(checkpoint, f"{spec.key}.qweight", (spec.in_features // 8, padded))
    else:
        names = [f"{spec.key}.weight"]
        check_shape(checkpoint, names[0], (spec.out_features, spec.in_features))
    bias = f"{spec.key}.bias"
    if spec.bias:
        check_shape(checkpoint, bias, (spec.out_features if kind == "dense" else padded,))
        names.append(bias)
    elif checkpoint.has(bias):
        # GPTQ writers leave a bias of zeros beside every matrix.
        if kind != "gptq" or bool(checkpoint.tensor(bias).any()):
            raise CheckpointError(
                f"the checkpoint has a tensor '{bias}', but this architecture has no bias there; "
                "the weights and config.json belong to different models"
            )
        names.append(bias)
    return names


def check_shape(checkpoint: Checkpoint, name: str, wanted: tuple[int | None, ...]) -> None:
    """Check from the header that a tensor is there and has a shape; None stands for any size.

    Raises:
        CheckpointError: it is missing or has another shape.
    """
    shown = "[" + ", ".join("any" if size is None else str(size) for size in wanted) + "]"
    if not checkpoint.has(name):
        raise CheckpointError(
            f"the checkpoint has no tensor '{name}'; expected one of shape {shown}. "
            "The model is incomplete, or its config.json belongs to another one"
        )
    shape = checkpoint.shape(name)
    fits = len(shape) == len(wanted) and all(size in (None, found) for size, found in zip(wanted, shape, strict=True))
    if not fits:
        raise CheckpointError(
            f"tensor '{name}' must have shape {shown} by config.json, it has {list(shape)}; "
            "the weights and config.json belong to different models"
        )


def load_linear(
    checkpoint: Checkpoint,
    spec: LinearSpec,
    *,
    device: torch.device,
    gptq_format: str | None = None,
    precision: str = "exact",
    memory: ops.WeightMemory | None = None,
) -> Linear:
    """Read one layer and make it ready to multiply.

    Args:
        checkpoint: has the layer in one of the three kinds.
        spec: its key and size.
        device: where it will run.
        gptq_format: `checkpoint_format` of the model's `quantization_config`; matters for GPTQ only.
        precision: "fast" multiplies quantised matrices as whole numbers; "exact" in float32. A GPTQ matrix whose groups
            are no multiples of 32 rows is multiplied in float32 in either case.
        memory: for the codes of "fast" matrices, shared by the layers of a model.

    Raises:
        CheckpointError: see `check_linear`, and anything else wrong with the tensors' contents.
    """
    check_linear(checkpoint, spec)
    kind = checkpoint.kind(spec.key)
    parts = {name: tensor.to(device) for name, tensor in checkpoint.linear(spec.key).items()}
    bias = parts["bias"][: spec.out_features].to(torch.float32) if spec.bias else None
    if kind == "exl2" and precision == "fast":
        exl2_planes = ops.exl2_prepare_planes(*(parts[name] for name in EXL2_PARTS), memory=memory)
        return PlaneLinear(exl2_planes, bias, spec.out_features)
    if kind == "exl2":
        exl2 = ops.exl2_prepare(*(parts[name] for name in EXL2_PARTS))
        return QuantisedLinear(exl2, bias, spec.out_features, lambda x: ops.exl2_matmul(x, exl2))
    if kind == "gptq":
        offset = zero_offset(gptq_format)
        gptq_parts = (parts["qweight"], parts["qzeros"], parts["scales"], parts.get("g_idx"))
        if precision == "fast":
            planes = ops.gptq_prepare_planes(*gptq_parts, zero_offset=offset, memory=memory)
            if planes is not None:
                return PlaneLinear(planes, bias, spec.out_features)
        gptq = ops.gptq_prepare(*gptq_parts, zero_offset=offset)
        return QuantisedLinear(gptq, bias, spec.out_features, lambda x: ops.gptq_matmul(x, gptq))
    return DenseLinear(parts["weight"].contiguous(), bias)

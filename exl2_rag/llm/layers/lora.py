"""Low-rank additions to a layer: y += weight * scale * (x A^T) B^T, for the rows of a step that ask for them.

A step holds rows of many requests, each with its own set of adapters. Rows are grouped by adapter, so that each pair of
matrices is multiplied once a step, whatever the weights of the requests. What a row gets depends on that row and its
own adapters alone: the products are `ops.dense_matmul`, and adapters are added in the order of their digests.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al. 2021); rows of several adapters in one batch as
in S-LoRA (Sheng et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from exl2_rag.llm.kernels import ops
from exl2_rag.llm.layers.activations import Activations
from exl2_rag.llm.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class LoraMatrices:
    """What one adapter adds to one layer of K inputs and N outputs; R is the rank.

    Attributes:
        a: [R, K] of a linear layer, [V, R] of the embedding; float32, float16 or bfloat16, contiguous.
        b: [N, R], likewise.
        bias: [N] float32, added to the product before it is scaled; or None.
        scale: lora_alpha / R, or what the adapter's config makes of it.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: float

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.a.nbytes + self.b.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True)
class LoraPart:
    """The rows of a step that one adapter is at work on.

    Attributes:
        modules: the adapter's matrices by the key of their layer.
        rows: a range, or [n] int64, each at most once.
        weights: [n, 1] float32, what each row multiplies the adapter's scale by.
    """

    modules: Mapping[str, LoraMatrices]
    rows: slice | Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class LoraRows:
    """The adapters at work on the rows of a tensor, in the order in which they are added."""

    parts: tuple[LoraPart, ...]

    def add(self, y: Tensor, x: Tensor, key: str) -> None:
        """Add to y [T, N] float32 what the adapters make of x [T, K] float32 in the layer `key`."""
        for part in self.parts:
            matrices = part.modules.get(key)
            if matrices is not None:
                _add(y, ops.dense_matmul(_take(x, part.rows), matrices.a), matrices, part)

    def add_embedding(self, y: Tensor, token_ids: Tensor, key: str) -> None:
        """Add to y [T, N] float32 what the adapters have for the token ids [T] int64 in the embedding `key`."""
        for part in self.parts:
            matrices = part.modules.get(key)
            if matrices is not None:
                _add(y, ops.embedding(matrices.a, _take(token_ids, part.rows).contiguous()), matrices, part)


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _add(y: Tensor, inner: Tensor, matrices: LoraMatrices, part: LoraPart) -> None:
    """y[rows] += weights * scale * (inner B^T + bias), where inner is [n, R]."""
    factor = part.weights * matrices.scale
    if matrices.bias is None:
        product = ops.dense_matmul(inner * factor, matrices.b)
    else:
        product = ops.dense_matmul(inner, matrices.b, bias=matrices.bias) * factor
    if isinstance(part.rows, slice):
        y[part.rows] += product
    else:
        y.index_add_(0, part.rows, product)


class AdaptedLinear:
    """A linear layer to which the adapters of a step add, if there are any."""

    def __init__(self, base: Linear, key: str) -> None:
        self.base = base
        self.key = key

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.base.weight_bytes

    def __call__(self, x: Activations, *, add_to: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        y = self.base(x, add_to=add_to)
        if x.lora is not None:
            x.lora.add(y, x.x, self.key)
        return y

"""What one or more matrices are about to multiply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from exl2_rag.llm.kernels import ops

if TYPE_CHECKING:
    from exl2_rag.llm.layers.lora import LoraRows


class Activations:
    """The input [T, C] of linear layers, float32, and the same as whole numbers where a layer asks for that.

    Layers that read one input mostly share an input order too (q, k and v; gate and up). The whole numbers are made
    once for each order.

    Attributes:
        x: the input.
        lora: the adapters at work on its rows, or None.
    """

    def __init__(self, x: Tensor, lora: LoraRows | None = None) -> None:
        self.x = x
        self.lora = lora
        self._digits: dict[int, ops.Digits] = {}

    def digits(self, perm: Tensor) -> ops.Digits:
        """`x` as whole numbers in the order `perm` [C]; see `ops.digits`. The same tensor gives the same object."""
        found = self._digits.get(id(perm))
        if found is None:
            found = self._digits[id(perm)] = ops.digits(self.x, perm)
        return found

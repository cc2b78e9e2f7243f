"""The gated MLP: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.llm.kernels import ops
from exl2_rag.llm.layers.activations import Activations
from exl2_rag.llm.layers.linear import Linear
from exl2_rag.llm.layers.lora import LoraRows

MOST_ROWS = 256
"""Rows at a time: they do not depend on each other, and of a long prompt these buffers are the largest."""


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """One layer's MLP."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return sum(part.weight_bytes for part in (self.gate_proj, self.up_proj, self.down_proj))

    def __call__(self, x: Tensor, *, add_to: Tensor, lora: LoraRows | None = None) -> None:
        """[T, hidden_size] float32, normed; the result is added to `add_to`, of the same shape.

        `lora` are the adapters at work on the rows.
        """
        if lora is not None or x.shape[0] <= MOST_ROWS:  # adapters know the rows of a whole step only
            self._add_rows(x, add_to, lora)
            return
        for rows, target in zip(torch.split(x, MOST_ROWS), torch.split(add_to, MOST_ROWS), strict=True):
            self._add_rows(rows, target, None)

    def _add_rows(self, x: Tensor, add_to: Tensor, lora: LoraRows | None) -> None:
        self.down_proj(Activations(self._gated(x, lora), lora), add_to=add_to)

    def _gated(self, x: Tensor, lora: LoraRows | None) -> Tensor:
        inputs = Activations(x, lora)
        gate, up = self.gate_proj(inputs), self.up_proj(inputs)
        return ops.silu_mul_into(gate, up) if gate.is_contiguous() else ops.silu_mul(gate, up)

"""The adapters of a step: which rows of its tensors each is at work on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exl2_rag.llm.layers.lora import LoraPart, LoraRows
from exl2_rag.llm.lora.adapter import LoraAdapter
from exl2_rag.llm.lora.shelf import LoraSet


@dataclass(slots=True)
class _Rows:
    adapter: LoraAdapter
    ranges: list[tuple[int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, start: int, n_rows: int, weight: float) -> None:
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1] = (self.ranges[-1][0], start + n_rows)
        else:
            self.ranges.append((start, start + n_rows))
        self.weights += [weight] * n_rows

    def part(self) -> LoraPart:
        rows: slice | Tensor
        if len(self.ranges) == 1:
            rows = slice(*self.ranges[0])
        else:
            rows = torch.cat([torch.arange(start, end) for start, end in self.ranges])
        return LoraPart(self.adapter.modules, rows, torch.tensor(self.weights, dtype=torch.float32)[:, None])


def lora_rows(sequences: Iterable[tuple[LoraSet, int]]) -> LoraRows | None:
    """Group the rows of sequences that lie end to end by adapter; None if none has any.

    Args:
        sequences: the adapters of each, and how many rows it has.
    """
    found: dict[str, _Rows] = {}
    start = 0
    for adapters, n_rows in sequences:
        for adapter, weight in adapters:
            if n_rows:
                found.setdefault(adapter.digest, _Rows(adapter)).add(start, n_rows, weight)
        start += n_rows
    return LoraRows(tuple(rows.part() for _, rows in sorted(found.items()))) if found else None

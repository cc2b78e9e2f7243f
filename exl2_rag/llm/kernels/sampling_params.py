"""How each row of logits is drawn from, as tensors: what the sampling op takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.errors import DTypeError, ShapeError


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Parameters of B rows, on the device of the logits.

    Attributes:
        temperatures: [B] float64; 0 is greedy.
        top_k: [B] int32; 0 is off.
        top_p: [B] float64, above 0; 1 is off.
        min_p: [B] float64; 0 is off.
        seeds, steps: [B] int64; name each row's uniform number, whatever else is in the batch.
    """

    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    steps: Tensor

    def check(self, op: str, batch: int) -> None:
        """Refuse tensors that are not parameters of `batch` rows.

        Raises:
            DTypeError, ShapeError: what does not fit.
        """
        for name, dtype in (
            ("temperatures", torch.float64),
            ("top_k", torch.int32),
            ("top_p", torch.float64),
            ("min_p", torch.float64),
            ("seeds", torch.int64),
            ("steps", torch.int64),
        ):
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype:
                raise DTypeError(f"{op}: {name} must be {dtype}, it is {tensor.dtype}")
            if tensor.shape != (batch,) or not tensor.is_contiguous():
                raise ShapeError(f"{op}: {name} must be [{batch}] and contiguous, it is {list(tensor.shape)}")

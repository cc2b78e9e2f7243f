"""Hidden states of all calibration rows, in memory or, where they are large, in a file mapped into it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

SPILL_BYTES = 4 << 30
"""States larger than this are kept in a file."""


class HiddenStates:
    """[R, T, C] float32, one row at a time on the device that works on it.

    Args:
        rows, length, width: R, T, C.
        spill: file for states that are too large for memory; made when needed, the caller's to delete.
    """

    def __init__(self, rows: int, length: int, width: int, *, spill: Path) -> None:
        count = rows * length * width
        if count * 4 > SPILL_BYTES:
            flat = torch.from_file(str(spill), shared=True, size=count, dtype=torch.float32)
            self._states = flat.view(rows, length, width)
        else:
            self._states = torch.zeros((rows, length, width))

    @property
    def n_rows(self) -> int:
        """Calibration rows."""
        return self._states.shape[0]

    @property
    def tensor(self) -> Tensor:
        """All of them."""
        return self._states

    def row(self, index: int, device: torch.device) -> Tensor:
        """A copy of one row [T, C] on a device."""
        return self._states[index].to(device, copy=True)

    def store(self, index: int, row: Tensor) -> None:
        """Replace one row."""
        self._states[index].copy_(row)

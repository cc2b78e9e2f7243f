"""What launches CUDA kernels, as the launchers see it: a card, or in the tests the emulation.

A launcher computes grid sizes and argument lists and calls `Backend.launch`. Kernels' parameters are pointers, which
tensors give, and numbers, which must say their width: a Python int alone would not.

Needs no CUDA packages; `cuda_runtime.py` has the backend of a card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

if TYPE_CHECKING:  # compiling kernels ahead needs no torch
    from torch import Tensor

SOURCE_DIR: Final = Path(__file__).resolve().parent / "cuda"
"""Where the `.cu` files are; each is a module, named by its stem."""

ARCHITECTURES: Final = (75, 80, 86, 89, 90, 120)
"""Compute capabilities that kernels are compiled and checked for; cards between two of them run too."""

MIN_ARCHITECTURE: Final = ARCHITECTURES[0]

WARP_THREADS: Final = 32


@dataclass(frozen=True, slots=True)
class I32:
    """A 32-bit integer parameter (`int`, `unsigned`)."""

    value: int


@dataclass(frozen=True, slots=True)
class I64:
    """A 64-bit integer parameter (`long long`)."""

    value: int


@dataclass(frozen=True, slots=True)
class F32:
    """A float32 parameter."""

    value: float


Scalar = I32 | I64 | F32
Argument: TypeAlias = "Tensor | Scalar | None"
Dim3 = tuple[int, int, int]


class Backend(Protocol):
    """One device that runs kernels.

    Attributes:
        arch: compute capability as two or three digits: 75, 80, 86, 89, 90, 120.
        multiprocessors: streaming multiprocessors of the card.
        max_shared_bytes: dynamic shared memory that a block may have.
    """

    @property
    def arch(self) -> int: ...  # noqa: D102

    @property
    def multiprocessors(self) -> int: ...  # noqa: D102

    @property
    def max_shared_bytes(self) -> int: ...  # noqa: D102

    def launch(
        self,
        module: str,
        kernel: str,
        grid: Dim3,
        block: Dim3,
        args: Sequence[Argument],
        *,
        shared_bytes: int = 0,
    ) -> None:
        """Queue a kernel on the current stream of the device of its tensors; returns before it has run.

        Args:
            module: the stem of the `.cu` file.
            kernel: the name of an entry point of it.
            grid, block: sizes in x, y, z; all at least 1.
            args: one per parameter, in order. A tensor gives the address of its first element, None a null pointer.
            shared_bytes: dynamic shared memory of a block.

        Raises:
            KernelError: there is no such kernel, the arguments are not its parameters, or it cannot be launched.
            DeviceError: the tensors are not all on this device.
        """
        ...


def modules() -> list[str]:
    """The names of all modules."""
    return sorted(path.stem for path in SOURCE_DIR.glob("*.cu"))


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)

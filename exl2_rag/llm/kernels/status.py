"""What the status codes of the native ops mean; they are those of cpu/ops.h."""

from __future__ import annotations

from exl2_rag.errors import KernelError, ShapeError

_NO_MEMORY, _OUT_OF_RANGE = 1, 2


def check(name: str, status: int) -> None:
    """Raise what the status of the op `name` stands for; 0 is success.

    Raises:
        KernelError: no memory, or an unknown status.
        ShapeError: something pointed outside its tensor.
    """
    if status == _NO_MEMORY:
        raise KernelError(f"{name}: not enough memory for its scratch space; free some or make the batch smaller")
    if status == _OUT_OF_RANGE:
        raise ShapeError(f"{name}: a position, slot, page, id or length points outside its tensor")
    if status != 0:
        raise KernelError(f"{name}: the native library returned the unknown status {status}")

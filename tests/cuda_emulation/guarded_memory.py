"""Copies of tensors with nothing around them: an access beyond a tensor's memory ends in a page that is not there.

Each storage that a kernel is given is copied to the end of pages of its own, between two that may not be touched, and
copied back after the launch. Its end is found to 16 bytes, its beginning to a page.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from torch import Tensor

_PAGE: Final = mmap.PAGESIZE
_ALIGNMENT: Final = 16
_POISON: Final = 0xFF
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _Region:
    """One storage's copy."""

    def __init__(self, address: int, n_bytes: int) -> None:
        self.source, self.n_bytes = address, n_bytes
        padded = -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        inner = -(-padded // _PAGE) * _PAGE
        self._total = inner + 2 * _PAGE
        self._base = _libc.mmap(
            None, self._total, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        if self._base in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("no memory for a guarded copy")
        for guard in (self._base, self._base + _PAGE + inner):
            _libc.mprotect(guard, _PAGE, 0)
        self.copy = self._base + _PAGE + inner - padded
        ctypes.memset(self._base + _PAGE, _POISON, inner)
        ctypes.memmove(self.copy, address, n_bytes)

    def give_back(self) -> None:
        ctypes.memmove(self.source, self.copy, self.n_bytes)

    def free(self) -> None:
        _libc.munmap(self._base, self._total)


@contextmanager
def guarded(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The addresses of copies of the tensors; what is written there is in the tensors afterwards."""
    regions: dict[int, _Region] = {}
    try:
        addresses = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            if start == 0 or storage.nbytes() == 0:
                addresses.append(tensor.data_ptr())
                continue
            if start not in regions:
                regions[start] = _Region(start, storage.nbytes())
            addresses.append(regions[start].copy + tensor.data_ptr() - start)
        yield addresses
        for region in regions.values():
            region.give_back()
    finally:
        for region in regions.values():
            region.free()

"""Memory for what a step computes on the way: used again at once, in large pages, and given back between steps.

The tensors of a prefill step come and go in sizes of megabytes. Through the C library's allocator they leave holes that
later sizes do not fit, so the process grows to twice of what is ever in use. Here they lie in one range of addresses,
each in the first hole that is large enough, and neighbouring holes become one. When nothing is in use any more, the
system gets the memory back.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SLAB_BYTES = 256 << 20
SMALLEST_BYTES = 1 << 20
"""Smaller tensors are left to torch."""

_LARGE_PAGE = 2 << 20
_ALIGNMENT = 4096 + 128
"""Tensors begin on different lines of a page, so that rows of two of them do not push each other out of a cache."""


class Slab:
    """Addresses that the system backs with memory when they are first touched; the holes among those in use.

    Raises:
        OSError: the system has no such range left.
    """

    def __init__(self, n_bytes: int) -> None:
        # Private: what is given back of a shared range stays in memory.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._map = mmap.mmap(-1, n_bytes + _LARGE_PAGE, **private)
        self._exported = (ctypes.c_char * (n_bytes + _LARGE_PAGE)).from_buffer(self._map)
        start = ctypes.addressof(self._exported)
        self._offset = -start % _LARGE_PAGE
        self._n_bytes = n_bytes
        self.base = start + self._offset
        self._holes = [(0, n_bytes)]
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)  # a wish: where it is not granted, the pages are small ones

    def part(self, address: int, n_bytes: int) -> ctypes.Array[ctypes.c_char]:
        """The bytes there; keeps the addresses valid, even when the slab is gone."""
        return (ctypes.c_char * n_bytes).from_buffer(self._map, address - self.base + self._offset)

    def owns(self, address: int) -> bool:
        """Whether it is one of this slab's."""
        return self.base <= address < self.base + self._n_bytes

    @property
    def is_unused(self) -> bool:
        """Whether nothing is taken."""
        return self._holes == [(0, self._n_bytes)]

    def take(self, n_bytes: int) -> int | None:
        """The address of the first hole of `n_bytes`, which is one no more; None if there is none."""
        for index, (start, length) in enumerate(self._holes):
            if length >= n_bytes:
                self._holes[index : index + 1] = [(start + n_bytes, length - n_bytes)] if length > n_bytes else []
                return self.base + start
        return None

    def give(self, address: int, n_bytes: int) -> None:
        """Free what was taken there."""
        start, end = address - self.base, address - self.base + n_bytes
        index = bisect.bisect(self._holes, (start, 0))
        last = index
        if last < len(self._holes) and self._holes[last][0] == end:
            end += self._holes[last][1]
            last += 1
        if index > 0 and sum(self._holes[index - 1]) == start:
            index -= 1
            start = self._holes[index][0]
        self._holes[index:last] = [(start, end - start)]

    def give_back(self) -> None:
        """Let the system have the memory behind the addresses; nothing may be taken."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, self._offset, self._n_bytes)


class WorkMemory:
    """Hands out tensors on the CPU whose memory is used again when they and their views are gone. For any threads.

    Args:
        slab_bytes: addresses taken from the system at a time.
        smallest_bytes: smaller tensors are left to torch.
        gives_back: what nobody uses goes back to the system.
    """

    def __init__(
        self, slab_bytes: int = SLAB_BYTES, smallest_bytes: int = SMALLEST_BYTES, *, gives_back: bool = True
    ) -> None:
        self._gives_back = gives_back
        self._slab_bytes = slab_bytes
        self._smallest_bytes = smallest_bytes
        self._slabs: list[Slab] = []
        self._taken: dict[int, tuple[Slab, int, weakref.ref[ctypes.Array[ctypes.c_char]]]] = {}
        self._freed: deque[int] = deque()
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised, contiguous tensor on the CPU."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes < self._smallest_bytes:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._take(n_bytes), dtype=dtype).view(shape)

    def owns(self, address: int) -> bool:
        """Whether it lies in this memory."""
        return any(slab.owns(address) for slab in self._slabs)

    def forget_lock(self) -> None:
        """In a forked child: the thread that held the lock may not be there."""
        self._lock = threading.Lock()

    def _take(self, n_bytes: int) -> ctypes.Array[ctypes.c_char]:
        padded = -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._collect()
            for slab in self._slabs:
                address = slab.take(padded)
                if address is not None:
                    break
            else:
                slab = Slab(max(self._slab_bytes, padded))
                self._slabs.append(slab)
                address = slab.take(padded)
                assert address is not None
            part = slab.part(address, n_bytes)
            # The tensor's storage holds `part`; when that goes, so has everything that looks at this memory.
            self._taken[address] = (slab, padded, weakref.ref(part, lambda _: self._free(address)))
        return part

    def _free(self, address: int) -> None:
        """Called wherever the last reference is dropped, maybe within `_take`, when the lock is held by this thread."""
        self._freed.append(address)
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
                if self._gives_back and not self._taken:
                    for slab in self._slabs:
                        slab.give_back()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while self._freed:
            address = self._freed.popleft()
            slab, n_bytes, _ = self._taken.pop(address)
            slab.give(address, n_bytes)


_memory = WorkMemory()
_chosen = threading.local()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_memory.forget_lock)


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised, contiguous tensor on the CPU for results of an op."""
    memory: WorkMemory = getattr(_chosen, "memory", _memory)
    return memory.empty(shape, dtype)


@contextmanager
def use(memory: WorkMemory) -> Iterator[None]:
    """Let this thread's results lie in a memory of their own meanwhile."""
    _chosen.memory = memory
    try:
        yield
    finally:
        del _chosen.memory

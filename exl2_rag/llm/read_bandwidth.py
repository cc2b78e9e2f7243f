"""How fast memory can be read: what the speed of a memory-bound decode step is compared with.

A buffer larger than the caches is read from end to end by a few different loops, each already vectorised and spread
over the threads; the fastest pass of the fastest loop counts. A loop that is slower than memory measures itself, not
memory, so more than one is tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from exl2_rag.llm.kernels.ops import native_available, read_memory

BUFFER_BYTES = 256 << 20
PASSES = 4


@dataclass(frozen=True, slots=True)
class ReadBandwidth:
    """Bytes read a second, and the loop that reached it."""

    bytes_per_second: float
    method: str


def measure_read_bandwidth(
    num_threads: int, *, buffer_bytes: int = BUFFER_BYTES, passes: int = PASSES
) -> ReadBandwidth:
    """Read memory for a fraction of a second with `num_threads` threads.

    The buffer is taken for the call and given back. torch's number of threads is set meanwhile and restored.

    Args:
        num_threads: as many as the engine uses.
        buffer_bytes: a multiple of 8; many times the last cache.
        passes: of each loop; the fastest counts, because everything that disturbs a pass makes it slower.
    """
    buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            loops = _loops(buffer, pool, num_threads)
            best = {name: min(_seconds(loop) for _ in range(passes)) for name, loop in loops.items()}
    finally:
        torch.set_num_threads(torch_threads)
    method = min(best, key=best.__getitem__)
    return ReadBandwidth(buffer_bytes / best[method], method)


def _loops(buffer: torch.Tensor, pool: ThreadPoolExecutor, num_threads: int) -> Mapping[str, Callable[[], object]]:
    words = np.array_split(buffer.numpy().view(np.uint64), num_threads)
    floats = np.array_split(buffer.numpy(), num_threads)
    loops: dict[str, Callable[[], object]] = {}
    if native_available():
        loops["exl2_rag native"] = lambda: read_memory(buffer)
    return loops | {
        "torch.sum float32": buffer.sum,
        "numpy.bitwise_or uint64": lambda: list(pool.map(np.bitwise_or.reduce, words)),
        "numpy.dot float32": lambda: list(pool.map(np.dot, floats, floats)),
    }


def _seconds(loop: Callable[[], object]) -> float:
    started = time.perf_counter()
    loop()
    return time.perf_counter() - started

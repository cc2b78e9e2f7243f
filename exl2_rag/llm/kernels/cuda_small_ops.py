"""Launchers of the small CUDA kernels: norms, rotary positions, activations, embedding.

Each takes the backend first, allocates its result and launches; shapes, dtypes and devices were checked by `ops.py`.
Nothing here waits for the card, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from exl2_rag.llm.kernels.cuda_backend import F32, I32, I64, WARP_THREADS, Backend, ceil_div

_MAX_BLOCK: Final = 1024
_SUFFIXES: Final = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def _row_block(columns: int) -> int:
    """Threads for one row, four columns each: a function of the row's length alone, or results would depend on T."""
    return min(_MAX_BLOCK, ceil_div(ceil_div(columns, 4), WARP_THREADS) * WARP_THREADS)


def _vectorised(columns: int, *tensors: Tensor) -> bool:
    """Whether every row of every tensor can be read four numbers at a time."""
    return columns % 4 == 0 and all(
        tensor.data_ptr() % (4 * tensor.element_size()) == 0 and all(stride % 4 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def _rows(x: Tensor) -> Tensor:
    """`x`, with rows contiguous in themselves; rows may be apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(backend: Backend, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [T, C] float32 or float16, normed and multiplied by weight [C] float32; result in `out_dtype`, else as x."""
    x = _rows(x)
    rows, columns = x.shape
    result = torch.empty((rows, columns), dtype=out_dtype or x.dtype, device=x.device)
    if result.numel() == 0:
        return result
    backend.launch(
        "rms_norm",
        f"rms_norm_{_SUFFIXES[x.dtype]}_{_SUFFIXES[result.dtype]}",
        (rows, 1, 1),
        (_row_block(columns), 1, 1),
        (
            x,
            weight,
            result,
            I32(columns),
            I64(x.stride(0)),
            F32(eps),
            I32(_vectorised(columns, x, weight, result)),
        ),
    )
    return result

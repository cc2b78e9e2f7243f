"""Draws tokens on a card: what `sampler.py` does for plain rows, in one launch and one wait.

Parameters of all rows and the masks go to the card in one piece each, and the tokens come back in one. The filters and
the numbers are those of `sampler.py`; weights are float32 there, so where the mass comes within about 1e-7 of a
threshold the token may be another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exl2_rag.llm.kernels import cuda_sampling
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.kernels.sampling_params import RowSampling
from exl2_rag.llm.sampling.params import SamplingParams
from exl2_rag.llm.step_arrays import host_tensor

_64_BITS = (1 << 64) - 1
_LARGEST_INT = (1 << 31) - 1


def sample_rows(
    backend: Backend,
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    steps: Sequence[int],
    allowed: Sequence[NDArray[np.bool_] | None],
) -> list[int]:
    """Draw one token a row.

    Args:
        backend: runs the kernel on the device of the logits.
        logits: [L, V] float32. Not modified.
        params, seeds, steps: L of each.
        allowed: L times [V] bool, or None for all.

    Returns:
        L token ids; -1 for a row of which none can be drawn.
    """
    count = logits.shape[0]
    # Six numbers a row in 64-bit words; top_k, of 32 bits, comes last.
    words = np.zeros(5 * count + -(-count // 2), dtype=np.int64)
    doubles = words.view(np.float64)
    for row, one in enumerate(params):
        doubles[row] = one.temperature
        doubles[count + row] = one.top_p
        doubles[2 * count + row] = one.min_p
    words[3 * count : 4 * count] = np.array([seed & _64_BITS for seed in seeds], dtype=np.uint64).view(np.int64)
    words[4 * count : 5 * count] = steps
    words[5 * count :].view(np.int32)[:count] = [min(one.top_k, _LARGEST_INT) for one in params]
    on_device = host_tensor(words, logits.device).to(logits.device, non_blocking=True)
    temperatures, top_p, min_p, seed_words, step_words, top_k = torch.split(
        on_device, [count] * 5 + [len(words) - 5 * count]
    )
    rows = RowSampling(
        temperatures=temperatures.view(torch.float64),
        top_k=top_k.view(torch.int32)[:count],
        top_p=top_p.view(torch.float64),
        min_p=min_p.view(torch.float64),
        seeds=seed_words,
        steps=step_words,
    )
    tokens, _ = cuda_sampling.sample(backend, logits, _mask(allowed, logits), rows)
    return [int(token) for token in tokens.tolist()]


def _mask(allowed: Sequence[NDArray[np.bool_] | None], logits: Tensor) -> Tensor | None:
    """[L, words] int32 on the device, a bit a token; None if every row may draw anything."""
    if all(one is None for one in allowed):
        return None
    bits = np.ones((len(allowed), -(-logits.shape[1] // 64) * 64), dtype=np.bool_)
    for row, one in enumerate(allowed):
        if one is not None:
            bits[row, : len(one)] = one
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int64)
    return host_tensor(words, logits.device).to(logits.device, non_blocking=True).view(torch.int32)

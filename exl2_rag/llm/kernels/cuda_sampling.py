"""Launcher of the sampling kernel. It waits for nothing, so a step that samples can be captured in a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.llm.kernels.cuda_backend import I32, I64, Backend
from exl2_rag.llm.kernels.sampling_params import RowSampling

_THREADS = 1024


def sample(
    backend: Backend, logits: Tensor, mask: Tensor | None, rows: RowSampling, *, log_probs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `ops.sample`. Rows of logits and of the mask may be apart; each must be contiguous in itself."""
    batch, vocab_size = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if mask is not None and mask.stride(1) != 1:
        mask = mask.contiguous()
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    chosen = torch.empty(batch, dtype=torch.float32, device=logits.device) if log_probs else None
    if batch:
        backend.launch(
            "sampling",
            "sample",
            (batch, 1, 1),
            (_THREADS, 1, 1),
            (
                logits,
                mask,
                rows.temperatures,
                rows.top_k,
                rows.top_p,
                rows.min_p,
                rows.seeds,
                rows.steps,
                tokens,
                chosen,
                I32(vocab_size),
                I64(logits.stride(0)),
                I64(0 if mask is None else mask.stride(0)),
            ),
        )
    return tokens, chosen

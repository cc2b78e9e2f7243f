"""Rows of logits, and the probabilities that come out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exl2_rag import SamplingParams
from exl2_rag.llm.sampling.draw import Draw
from exl2_rag.llm.sampling.pipeline import prepared, run_stages
from exl2_rag.llm.sampling.state import SamplerState

OFF = {"temperature": 1.0}  # the default temperature is not neutral


def draw_of(
    values: dict[str, Any], history: Sequence[int] = (), *, n_prompt: int | None = None, seed: int = 0, **more: Any
) -> Draw:
    """A draw with these parameters after these tokens, of which the first `n_prompt` (all) are the prompt."""
    params = SamplingParams(**{**OFF, **values})
    n_prompt = len(history) if n_prompt is None else n_prompt
    options = {name: more.pop(name) for name in ("end_ids", "breakers", "xtc_ignored") if name in more}
    state = SamplerState(params, history[:n_prompt], **options)
    state.history.follow(list(history))
    return Draw(params, seed=seed, step=len(history) - n_prompt, state=state, **more)


def distribution(logits: Tensor | Sequence[float], draws: Draw | Sequence[Draw]) -> Tensor:
    """[V] or [R, V] float64 probabilities from which the token is drawn."""
    rows = torch.as_tensor(logits, dtype=torch.float32)
    if isinstance(draws, Draw):
        return distribution(rows[None], [draws])[0]
    return run_stages(prepared(rows, draws), draws).softmax(dim=-1)


def logits_of(probabilities: Sequence[float]) -> Tensor:
    """[V] float32 logits with these probabilities."""
    return torch.tensor(np.log(np.array(probabilities)), dtype=torch.float32)


def random_logits(rows: int, vocab_size: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread

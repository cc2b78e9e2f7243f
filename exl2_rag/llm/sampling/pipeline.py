"""From logits to the distribution that a token is drawn from, row by row and stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from exl2_rag.llm.sampling import exclusion, masks, penalties, repeats, temperature, truncation, typical
from exl2_rag.llm.sampling.draw import Draw, uniforms
from exl2_rag.llm.sampling.params import SamplingParams
from exl2_rag.llm.sampling.scores import shifted

Stage = Callable[[Tensor, Sequence[SamplingParams]], Tensor]

STAGES: Final[dict[str, Stage]] = {
    "smoothing": temperature.smoothing,
    "temperature": temperature.temperature,
    "top_k": truncation.top_k,
    "top_p": truncation.top_p,
    "top_a": truncation.top_a,
    "min_p": truncation.min_p,
    "tfs": typical.tfs,
    "typical_p": typical.typical_p,
    "epsilon_cutoff": truncation.epsilon_cutoff,
    "eta_cutoff": truncation.eta_cutoff,
}


def prepared(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Apply all that comes before the stages: guidance, penalties, bias, bans, the constraint.

    Args:
        logits: [R, V] float32 on the CPU. Not modified.

    Returns:
        [R, V] float64 logits, -inf where a token may not be drawn.
    """
    scores = logits.double() if logits.dtype != torch.float64 else logits.clone()
    for row, draw in enumerate(draws):
        if draw.negative is not None:
            scale = draw.params.cfg_scale
            with_prompt = scores[row].log_softmax(dim=-1)
            without = draw.negative.to(scores).log_softmax(dim=-1)
            scores[row] = scale * with_prompt + (1 - scale) * without
        values = scores[row].numpy()
        state = draw.state
        if state is None:
            if draw.allowed is not None:
                values[~draw.allowed] = -np.inf
            continue
        if penalties.applies(state):
            penalties.penalise(values, state)
        if state.params.dry_multiplier > 0:
            repeats.dry(values, state)
        if state.params.no_repeat_ngram_size > 0:
            repeats.ban_repeated_ngrams(values, state)
        masks.add_bias(values, state)
        masks.forbid(values, state, draw.step, draw.allowed)
    return scores


def run_stages(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Apply each row's stages in its own order; rows with the same order go together.

    Args:
        scores: [R, V] float64 logits with a finite maximum in each row. May be modified.

    Returns:
        [R, V] float64 scores, -inf where filtered out, with a maximum of 0 in each row.
    """
    scores = shifted(scores)
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, draw in enumerate(draws):
        groups.setdefault(draw.params.stages, []).append(row)
    for names, rows in groups.items():
        together = len(rows) == len(draws)
        part = scores if together else scores[rows]
        members = [draws[row] for row in rows]
        for name in names:
            part = _run(name, part, members)
        if together:
            return part
        scores[rows] = part
    return scores


def _run(name: str, scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    if name in STAGES:
        return STAGES[name](scores, [draw.params for draw in draws])
    states = [draw.needed_state for draw in draws]
    if name == "xtc":
        return exclusion.xtc(scores, states, [uniforms(draw.seed, draw.step)[1] for draw in draws])
    assert name == "mirostat"
    return exclusion.mirostat(scores, states, [draw.step for draw in draws])

"""Draws the next token of each row of logits. Knows nothing of requests, text or pages.

The samplers are those of `sampling/`: of transformers, in its order, where it has them. What a row draws depends on its
logits, its parameters, its history, its seed and its step alone, never on the other rows: the uniform numbers come from
a counter-based generator keyed by the seed, sums run in a fixed order, and ties go to the lowest id.

Rows that need no more than temperature, top-k, top-p, min-p and a mask (`Draw.is_plain`) go together, on a card by its
kernel; all others are copied to the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exl2_rag.errors import EngineError
from exl2_rag.llm.device_sampler import sample_rows
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.sampling.draw import Draw, uniform
from exl2_rag.llm.sampling.masks import why_nothing_is_left
from exl2_rag.llm.sampling.measure import Measured, log_softmax, measure
from exl2_rag.llm.sampling.params import SamplingParams
from exl2_rag.llm.sampling.pipeline import prepared, run_stages
from exl2_rag.llm.sampling.scores import column
from exl2_rag.llm.sampling.truncation import min_p, top_k, top_p


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """The token of one row, and its log-probabilities if they were asked for."""

    token_id: int
    measured: Measured | None = None


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """`choose`, of which only the token ids are wanted."""
    return [choice.token_id for choice in choose(logits, draws)]


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[DrawnToken]:
    """Draw one token a row.

    Args:
        logits: [L, V] float32. Not modified.
        draws: L of them.

    Returns:
        L drawn tokens. The states of the draws have learned of them.

    Raises:
        EngineError: a row has no token that may be drawn, or holds NaN; the message names the first such row. Then no
            state has changed.
    """
    if logits.device.type != "cuda":
        return choose_with(None, logits, draws)
    from exl2_rag.llm.kernels import cuda_runtime

    return choose_with(cuda_runtime.backend(logits.device), logits, draws)


def choose_with(backend: Backend | None, logits: Tensor, draws: Sequence[Draw]) -> list[DrawnToken]:
    """As `choose`; the plain rows by the kernel of a CUDA backend, if there is one."""
    others = [row for row, draw in enumerate(draws) if not draw.is_plain]
    if not others:
        return [DrawnToken(token_id) for token_id in _plain(backend, logits, draws, range(len(draws)))]
    chosen: dict[int, DrawnToken] = {}
    if plain := [row for row, draw in enumerate(draws) if draw.is_plain]:
        tokens = _plain(backend, logits[plain], [draws[row] for row in plain], plain)
        chosen.update(zip(plain, map(DrawnToken, tokens), strict=True))
    chosen.update(zip(others, _others(logits[others].cpu(), [draws[row] for row in others], others), strict=True))
    return [chosen[row] for row in range(len(draws))]


def _plain(backend: Backend | None, logits: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> list[int]:
    return _on_host(logits, draws, rows) if backend is None else _on_card(backend, logits, draws, rows)


def _on_card(backend: Backend, logits: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> list[int]:
    tokens = sample_rows(
        backend,
        logits,
        [draw.params for draw in draws],
        [draw.seed for draw in draws],
        [draw.step for draw in draws],
        [draw.allowed for draw in draws],
    )
    if min(tokens, default=0) < 0:
        row = next(row for row, token in enumerate(tokens) if token < 0)
        best = float(_masked(logits[row : row + 1], draws[row : row + 1]).amax())
        raise EngineError(_why_not(best, rows[row], draws[row]))
    return tokens


def _on_host(logits: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> list[int]:
    logits = _masked(logits, draws)
    if logits.device.type == "cpu" and all(draw.params.is_greedy for draw in draws):
        return _greedy(logits.numpy(), draws, rows)
    best = logits.amax(dim=-1)  # NaN if there is one
    for row in (~torch.isfinite(best)).nonzero().flatten().tolist():
        raise EngineError(_why_not(float(best[row]), rows[row], draws[row]))
    # The lowest id among equals; argmax promises no order.
    ids = torch.arange(logits.shape[-1], device=logits.device)
    tokens = torch.where(logits == best[:, None], ids, logits.shape[-1]).amin(dim=-1)
    random_rows = [row for row, draw in enumerate(draws) if not draw.params.is_greedy]
    if random_rows:
        places = torch.tensor(random_rows, device=logits.device)
        members = [draws[row] for row in random_rows]
        tokens[places] = _draw(filter_logits(logits[places], [draw.params for draw in members]), members)
    return [int(token) for token in tokens.tolist()]


def _others(logits: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> list[DrawnToken]:
    """Draw rows that are not plain. [R, V] float32 on the CPU."""
    scores = prepared(logits, draws)
    tokens = _greedy(scores.numpy(), draws, rows)
    for row, draw in enumerate(draws):
        if draw.forced is not None:
            tokens[row] = draw.forced
    random_rows = [row for row, draw in enumerate(draws) if draw.forced is None and not draw.params.is_greedy]
    final: dict[int, Tensor] = {}
    if random_rows:
        members = [draws[row] for row in random_rows]
        left = run_stages(scores[random_rows], members)
        for row, one, token in zip(random_rows, left, _draw(left, members).tolist(), strict=True):
            final[row], tokens[row] = one, int(token)
    drawn: list[DrawnToken] = []
    for row, (draw, token) in enumerate(zip(draws, tokens, strict=True)):
        n_top = draw.params.logprobs
        drawn.append(DrawnToken(token, None if n_top is None else measure(logits[row], final.get(row), token, n_top)))
    for row, one in final.items():
        if draws[row].params.mirostat_mode:
            surprise = -float(log_softmax(one)[tokens[row]]) / math.log(2)
            draws[row].needed_state.learn_mu(draws[row].step, surprise)
    return drawn


def _greedy(logits: NDArray[np.float32] | NDArray[np.float64], draws: Sequence[Draw], rows: Sequence[int]) -> list[int]:
    """The most likely token of each row. numpy's argmax takes the first among equals, and NaN above all."""
    tokens = [int(row.argmax()) for row in logits]
    for row, token in enumerate(tokens):
        best = float(logits[row, token])
        if not np.isfinite(best) and draws[row].forced is None:
            raise EngineError(_why_not(best, rows[row], draws[row]))
    return tokens


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        logits: [L, V] with a finite maximum in each row.
        params: L of them, each with a temperature above 0.

    Returns:
        [L, V] float64: the logits, divided by the temperature and shifted to a maximum of 0; -inf where filtered out.
    """
    scores = logits.double()
    # The maximum goes first, so that no temperature, however small, makes inf - inf.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / column([one.temperature for one in params], scores)
    if any(one.top_k for one in params):
        scores = top_k(scores, params)
    if rows := [row for row, one in enumerate(params) if one.top_p < 1]:
        places = torch.tensor(rows, device=scores.device)
        scores[places] = top_p(scores[places], [params[row] for row in rows])
    if any(one.min_p > 0 for one in params):
        scores = min_p(scores, params)
    return scores


def _masked(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    if all(draw.allowed is None for draw in draws):
        return logits
    masked = logits.clone()
    for row, draw in enumerate(draws):
        if draw.allowed is not None:
            masked[row].masked_fill_(torch.from_numpy(~draw.allowed).to(logits.device), -torch.inf)
    return masked


def _draw(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[L] tokens: the first id at which the running sum of probabilities passes the uniform number.

    Rows with skew go by falling probability instead of by id, and their number u becomes u ** exp(-skew).
    """
    weights = scores.exp()
    numbers = [uniform(draw.seed, draw.step) for draw in draws]
    skewed = [row for row, draw in enumerate(draws) if draw.params.skew != 0]
    if not skewed:
        return _pick(weights, numbers)
    numbers = [number ** math.exp(min(-draw.params.skew, 700.0)) for number, draw in zip(numbers, draws, strict=True)]
    ordered, ids = weights[skewed].sort(dim=-1, descending=True, stable=True)
    weights[skewed] = ordered
    places = _pick(weights, numbers)
    places[skewed] = ids.gather(-1, places[skewed][:, None]).squeeze(-1)
    return places


def _pick(weights: Tensor, numbers: Sequence[float]) -> Tensor:
    running = weights.cumsum(dim=-1)
    mass = running[:, -1:]
    # A number just below 1 may round up to the whole mass, which no place passes.
    wanted = torch.minimum(column(numbers, running) * mass, mass.nextafter(torch.zeros_like(mass)))
    return torch.searchsorted(running, wanted, right=True).squeeze(-1)


def _why_not(best: float, row: int, draw: Draw) -> str:
    if best == -torch.inf:
        return f"row {row} has no token that may come next; {why_nothing_is_left(draw.state, draw.step, draw.allowed)}"
    return f"row {row} of the logits holds {best}; the model's weights or its cache are broken"

"""How likely a model finds the tokens of a prompt, collected from its logits slice by slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.errors import RequestError
from exl2_rag.llm.logprobs import TokenLogprob

ROWS_AT_A_TIME = 64
"""Rows of [rows, V] float64 that are made at a time: with 128k tokens of vocabulary 64 MiB."""

MOST_TOP = 100
"""Most likely tokens that can be asked for at each place."""


@dataclass(frozen=True, slots=True)
class _Place:
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs:
    """The log-probabilities of a prompt's tokens, by the model alone: no temperature, no masks.

    Args:
        token_ids: the prompt.
        top: how many of the most likely tokens to keep at each place; 0: none.
        first: the first token that is asked for.

    Raises:
        RequestError: `top` is out of range.
    """

    def __init__(self, token_ids: tuple[int, ...], *, top: int = 0, first: int = 0) -> None:
        if not 0 <= top <= MOST_TOP:
            raise RequestError(f"prompt_logprobs must be from 0 to {MOST_TOP}, got {top}")
        self._token_ids = token_ids
        self._top = top
        self._first = first
        self._places: dict[int, _Place] = {}

    @property
    def first_row(self) -> int:
        """The first position whose logits are needed: that before the first token asked for."""
        return max(0, self._first - 1)

    def receive(self, first: int, rows: Tensor) -> None:
        """Take the logits [rows, V] float32 after the tokens from position `first` on; positions may come again."""
        for offset in range(0, len(rows), ROWS_AT_A_TIME):
            part, start = rows[offset : offset + ROWS_AT_A_TIME], first + offset
            following = self._token_ids[start + 1 : start + 1 + len(part)]
            if following:
                self._take(start + 1, part[: len(following)], following)

    def _take(self, place: int, rows: Tensor, token_ids: tuple[int, ...]) -> None:
        logprobs = rows.cpu().double().log_softmax(dim=-1)
        chosen = logprobs.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()
        best = logprobs.topk(min(self._top, logprobs.shape[1]))
        for n, (ids, values) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
            self._places[place + n] = _Place(chosen[n], ids, values)

    def values(self) -> list[float]:
        """The log-probability of each token asked for; the first token of a prompt has none and is left out."""
        return [self._places[place].logprob for place in range(max(1, self._first), len(self._token_ids))]

    def result(self, token_text: Callable[[int], str]) -> tuple[TokenLogprob, ...]:
        """One entry for each token asked for, with the texts that `token_text` gives."""
        entries = []
        for place in range(self._first, len(self._token_ids)):
            token_id, found = self._token_ids[place], self._places.get(place)
            if found is None:  # the first token: nothing comes before it
                entries.append(TokenLogprob(token_id, token_text(token_id), None))
                continue
            top = tuple(
                TokenLogprob(one, token_text(one), logprob)
                for one, logprob in zip(found.top_ids, found.top_logprobs, strict=True)
            )
            entries.append(TokenLogprob(token_id, token_text(token_id), found.logprob, top=top))
        return tuple(entries)

"""What a step's logits are drawn from: sequences that are ready, and one draw for each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.llm.sampler import DrawnToken, choose
from exl2_rag.llm.sampling.draw import Draw
from exl2_rag.llm.scheduler import Slice


class Ready:
    """A sequence whose next tokens can be sampled.

    Attributes:
        logits: [1 + D, V]: after its last token, and after each of the D tokens of its draft.
        end: tokens that it had in the step.
        n_right: tokens of the draft known to be right.
    """

    __slots__ = ("draft", "end", "logits", "n_right", "sequence")

    def __init__(self, one: Slice, logits: Tensor) -> None:
        self.sequence = one.sequence
        self.logits = logits
        self.draft = one.draft
        self.end = one.start + one.n_tokens
        self.n_right = 0


def draw_each(rows: list[Tensor], draws: list[Draw]) -> list[DrawnToken] | list[DrawnToken | Exception]:
    """One token, or what went wrong, for each row [1, V]. All rows at once, and one by one only if that fails."""
    if not rows:
        return []
    try:
        return choose(torch.cat(rows), draws)
    except Exception:
        results: list[DrawnToken | Exception] = []
        for row, draw in zip(rows, draws, strict=True):
            try:
                results.append(choose(row, [draw])[0])
            except Exception as error:
                results.append(error)
        return results

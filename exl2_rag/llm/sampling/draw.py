"""How one row's token is to be drawn, and the chance it is drawn by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from exl2_rag.llm.sampling.params import SamplingParams
from exl2_rag.llm.sampling.state import SamplerState


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw one row's token.

    Attributes:
        params: of the request.
        seed, step: name the uniform numbers; the step is the count of new tokens before.
        allowed: [V] bool, what the constraint allows; None for all.
        state: of the sequence, its history up to date; needed unless `params.is_plain`.
        negative: [V] logits after the negative prompt, for guidance.
        forced: the token that must come; it is only measured.
    """

    params: SamplingParams
    seed: int
    step: int
    allowed: NDArray[np.bool_] | None = None
    state: SamplerState | None = None
    negative: Tensor | None = None
    forced: int | None = None

    @property
    def needed_state(self) -> SamplerState:
        """The state, where it cannot be done without."""
        assert self.state is not None, "these parameters need the state of their sequence"
        return self.state

    @property
    def is_plain(self) -> bool:
        """Whether temperature, top-k, top-p, min-p and the constraint's mask are all there is."""
        return self.params.is_plain and self.forced is None


def uniforms(seed: int, step: int) -> tuple[float, float]:
    """The numbers in [0, 1) that belong to this seed and step: for the draw, and for XTC."""
    bits = np.random.Philox(key=seed, counter=step).random_raw(2)
    return (int(bits[0]) >> 11) * 2.0**-53, (int(bits[1]) >> 11) * 2.0**-53


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) by which the token of this seed and step is drawn."""
    return uniforms(seed, step)[0]

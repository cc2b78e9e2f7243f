"""From a request to its sampler's state, and from a sequence to its next draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from exl2_rag.errors import RequestError
from exl2_rag.llm.request import SamplingParams
from exl2_rag.llm.sampling.draw import Draw
from exl2_rag.llm.sampling.state import SamplerState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from exl2_rag.llm.sequence import Sequence

LINE_END = "\n"


class TokenTexts(Protocol):
    """What is asked about the texts of tokens."""

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; a part of a character reads as "\ufffd"."""
        ...

    def tokens_with(self, text: str) -> frozenset[int]:
        """The ids of all tokens whose text contains `text`; if there is none, of the last one it is written with."""
        ...

    def special_tokens(self) -> frozenset[int]:
        """The ids that are no ordinary text."""
        ...


def sampler_state(
    params: SamplingParams, prompt: tuple[int, ...], end_ids: frozenset[int], texts: TokenTexts, vocab_size: int
) -> SamplerState | None:
    """The state that a request's sampling needs; None if it needs none.

    Args:
        end_ids: ids that end the text.

    Raises:
        RequestError: a parameter names a token id outside the vocabulary.
    """
    for name in ("banned_tokens", "allowed_tokens", "xtc_ignore_tokens", "logit_bias"):
        wrong = next((one for one in getattr(params, name) or () if one >= vocab_size), None)
        if wrong is not None:
            raise RequestError(f"{name} must hold token ids from 0 to {vocab_size - 1}, got {wrong}")
    if params.is_plain:
        return None
    breakers: set[int] = set()
    if params.dry_multiplier > 0:
        for one in params.dry_sequence_breakers:
            breakers |= texts.tokens_with(one) if isinstance(one, str) else {one}
    ignored: frozenset[int] | tuple[int, ...] = ()
    if params.xtc_probability > 0:
        ignored = params.xtc_ignore_tokens or ()
        if params.xtc_ignore_tokens is None:
            ignored = texts.special_tokens() | texts.tokens_with(LINE_END) | end_ids
    return SamplerState(
        params,
        prompt,
        end_ids=end_ids,
        breakers=breakers,
        xtc_ignored=[one for one in ignored if one < vocab_size],
    )


def next_draw(sequence: Sequence, allowed: NDArray[np.bool_] | None, negative: Tensor | None = None) -> Draw:
    """How the next token of a sequence is drawn.

    Args:
        allowed: [V] what its constraint allows, or None.
        negative: [1, V] the logits of its companion, or None.
    """
    state = sequence.sampler
    if state is not None and sequence.sampling.reads_history:
        state.history.follow(sequence.token_ids)
    forced = sequence.forced[0] if sequence.forced else None
    return Draw(
        sequence.sampling,
        sequence.seed,
        sequence.n_new,
        allowed,
        state,
        None if negative is None else negative[0],
        forced,
    )

"""Which tokens may come next in a sequence, all reasons taken together. Knows masks, no tensors and no logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from exl2_rag.llm.sequence import Sequence


def allowed_next(sequence: Sequence, vocab_size: int) -> NDArray[np.bool_] | None:
    """[V] bool: what its constraint, the end of a healed prompt and bans leave; None if anything may come.

    Raises:
        ConstraintError: the constraint gives up.
    """
    mask = None if sequence.matcher is None else sequence.matcher.fill_mask()
    if sequence.healing is not None:
        mask = _both(mask, sequence.healing.allowed(sequence.token_ids[sequence.n_prompt :], vocab_size))
    banned = sequence.bans.get(len(sequence.token_ids))
    if banned:
        mask = np.ones(vocab_size, dtype=np.bool_) if mask is None else mask
        mask[list(banned)] = False
    return mask


def _both(first: NDArray[np.bool_] | None, second: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second

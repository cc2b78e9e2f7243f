"""Texts written by chance under a constraint: what any model, however bad, could have written."""

from __future__ import annotations

from random import Random

import numpy as np

from exl2_rag.llm.constraint import Constraint
from exl2_rag.llm.tokenizer import Tokenizer


def random_text(constraint: Constraint, tokenizer: Tokenizer, seed: int, *, max_tokens: int = 2000) -> str | None:
    """A whole text of tokens drawn evenly from the mask; None if it did not end within `max_tokens`.

    Forced tokens are taken as such on every other occasion, so that both ways through the matcher are walked.
    """
    random = Random(seed)
    matcher = constraint.compile(tokenizer)
    ids: list[int] = []
    while not matcher.is_finished:
        if len(ids) >= max_tokens:
            return None
        forced = matcher.forced_tokens() if random.random() < 0.5 else []
        if not forced:
            allowed = np.flatnonzero(matcher.fill_mask())
            assert allowed.size, f"dead end after {tokenizer.decode(ids)!r}"
            forced = [int(random.choice(allowed))]
        for token_id in forced:
            matcher.advance(token_id)
            ids.append(token_id)
        if ids[-1] in tokenizer.eos_token_ids:
            break
    return tokenizer.decode(ids, after=tokenizer.encode("x"))

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl2_rag.errors import EngineError
from exl2_rag.llm.request import SamplingParams
from exl2_rag.llm.sampler import Draw, choose_with, sample
from tests.cuda_emulation import EmulatedBackend

VOCAB = 301
BACKEND = EmulatedBackend(80)

PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=1.0, top_k=2**40),
]


def logits_of(rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_card_draws_the_tokens_that_the_cpu_draws(seed):
    logits = logits_of(len(PARAMS), seed)
    draws = [Draw(params, seed=2**62 + seed, step=step) for step, params in enumerate(PARAMS)]
    assert [one.token_id for one in choose_with(BACKEND, logits, draws)] == sample(logits, draws)


def test_masks_of_some_rows_are_honoured():
    logits = logits_of(3, 9)
    only = np.zeros(VOCAB, dtype=np.bool_)
    only[VOCAB - 1] = True
    some = np.arange(VOCAB) % 7 == 3
    draws = [Draw(SamplingParams(temperature=1.0), seed=1, step=0, allowed=allowed) for allowed in (only, None, some)]
    tokens = [one.token_id for one in choose_with(BACKEND, logits, draws)]
    assert tokens == sample(logits, draws)
    assert tokens[0] == VOCAB - 1
    assert tokens[2] % 7 == 3


def test_a_row_that_cannot_be_drawn_from_is_named():
    logits = logits_of(2, 1)
    logits[1, 5] = torch.nan
    draws = [Draw(SamplingParams(), seed=1, step=0) for _ in range(2)]
    with pytest.raises(EngineError, match="row 1 of the logits holds nan"):
        choose_with(BACKEND, logits, draws)
    nothing = Draw(SamplingParams(), seed=1, step=0, allowed=np.zeros(VOCAB, dtype=np.bool_))
    with pytest.raises(EngineError, match="row 0 has no token that may come next"):
        choose_with(BACKEND, logits[:1], [nothing])

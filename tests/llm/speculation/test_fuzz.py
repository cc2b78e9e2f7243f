from __future__ import annotations

import pytest

from exl2_rag.llm.speculation.speculator import Speculator
from tests.llm.speculation.drafts import FreeRows, Guesses
from tests.llm.speculation.test_draft_model import draft_model
from tests.llm.speculation.test_speculation import right
from tests.support.engine_fuzz import EngineFuzz


@pytest.mark.parametrize("kind", ["guesses", "draft model"])
def test_random_operations_with_drafts_lose_nothing_leak_nothing_and_mix_nothing_up(kind: str) -> None:
    proposer = Guesses(right, wrong=0.3, seed=3) if kind == "guesses" else draft_model(4, n_pages=40)[0]
    fuzz = EngineFuzz(11, speculator=Speculator(proposer, costs=FreeRows()))
    fuzz.run(700, drain_every=350)
    assert fuzz.counts["finished"] > 50
    assert fuzz.engine.report().accepted_draft_tokens > 100

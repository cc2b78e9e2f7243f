"""A share of the engine fuzz; `benchmarks/engine_fuzz.py` runs as much as one likes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.engine_fuzz import EngineFuzz


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (1, {}),
        (2, {"n_pages": 20}),
        (3, {"max_batch_size": 2, "max_overtakes": 0}),
        (4, {"max_inter_token_gap": 3.0, "prefill_in_turns": True}),
        (5, {"has_drafts": True}),
    ],
)
def test_random_operations_lose_nothing_leak_nothing_and_mix_nothing_up(seed: int, options: dict[str, Any]) -> None:
    fuzz = EngineFuzz(seed, **options)
    fuzz.run(500, drain_every=250)
    assert fuzz.counts["finished"] > 30
    assert fuzz.engine.report().preemptions + fuzz.counts["aborted"] > 5

"""A share of the engine fuzz; `benchmarks/engine_fuzz.py` runs as much as one likes."""

from __future__ import annotations

import pytest

from tests.support.engine_fuzz import EngineFuzz


@pytest.mark.parametrize(
    ("seed", "sizes"),
    [
        (1, {}),
        (2, {"n_pages": 20}),
        (3, {"max_batch_size": 2, "max_overtakes": 0}),
        (4, {"max_inter_token_gap": 3.0, "prefill_in_turns": True}),
    ],
)
def test_random_operations_lose_nothing_leak_nothing_and_mix_nothing_up(seed: int, sizes: dict[str, int]) -> None:
    fuzz = EngineFuzz(seed, **sizes)
    fuzz.run(1200, drain_every=600)
    assert fuzz.counts["finished"] > 100
    assert fuzz.engine.report().preemptions + fuzz.counts["aborted"] > 20

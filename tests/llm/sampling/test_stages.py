"""Each stage against a table worked out by hand, and against transformers where that has it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from exl2_rag.llm.sampling.params import DEFAULT_ORDER
from tests.llm.sampling.support import distribution, draw_of, logits_of, random_logits

P = [0.4, 0.3, 0.15, 0.1, 0.05]
ENTROPY = -sum(p * math.log(p) for p in P)

# Parameters, and what is left of P, up to normalisation.
TABLE: list[tuple[dict[str, Any], list[float]]] = [
    ({}, P),
    ({"temperature": 0.5}, [p**2 for p in P]),
    ({"temperature": 2.0}, [p**0.5 for p in P]),
    ({"top_k": 2}, [0.4, 0.3, 0, 0, 0]),
    ({"top_p": 0.69}, [0.4, 0.3, 0, 0, 0]),
    ({"top_p": 0.71}, [0.4, 0.3, 0.15, 0, 0]),  # the token that crosses the threshold stays
    ({"min_p": 0.26}, [0.4, 0.3, 0.15, 0, 0]),
    ({"top_a": 0.5}, [0.4, 0.3, 0.15, 0.1, 0]),  # 0.5 * 0.4 ** 2 = 0.08
    ({"top_a": 1.0}, [0.4, 0.3, 0, 0, 0]),  # 0.16
    ({"epsilon_cutoff": 0.12}, [0.4, 0.3, 0.15, 0, 0]),
    ({"epsilon_cutoff": 0.9}, [0.4, 0, 0, 0, 0]),  # the most likely one always stays
    ({"eta_cutoff": 0.2}, [0.4, 0.3, 0.15, 0, 0]),  # entropy 1.3923: sqrt(0.2) * exp(-1.3923) = 0.1111
    ({"eta_cutoff": 0.07}, [0.4, 0.3, 0.15, 0.1, 0]),  # sqrt(0.07) * exp(-1.3923) = 0.0657
    # Surprise less entropy: 0.476, 0.188, 0.505, 0.910, 1.604.
    ({"typical_p": 0.29}, [0, 0.3, 0, 0, 0]),
    ({"typical_p": 0.5}, [0.4, 0.3, 0, 0, 0]),
    ({"typical_p": 0.8}, [0.4, 0.3, 0.15, 0, 0]),
    # First differences 0.1, 0.15, 0.05, 0.05; second 0.05, 0.1, 0; running share 1/3, 1, 1.
    ({"tfs": 0.3}, [0.4, 0, 0, 0, 0]),
    ({"tfs": 0.5}, [0.4, 0.3, 0, 0, 0]),
    ({"smoothing_factor": 0.5}, [math.exp(-0.5 * math.log(p / 0.4) ** 2) for p in P]),
    (
        {"smoothing_factor": 0.5, "smoothing_curve": 3.0},
        [math.exp(0.5 * math.log(p / 0.4) ** 3) for p in P],
    ),
    (
        {"smoothing_factor": 0.5, "smoothing_curve": 2.0, "temperature": 2.0},
        [math.exp(0.25 * (-0.5 * math.log(p / 0.4) ** 2 + 0.5 * math.log(p / 0.4) ** 3)) for p in P],
    ),
    ({"max_temp": 1.5, "min_temp": 1.5}, [p ** (1 / 1.5) for p in P]),
    ({"max_temp": 2.0, "temperature": 9.0}, [p ** (math.log(5) / (2 * ENTROPY)) for p in P]),
    (
        {"min_temp": 0.5, "max_temp": 2.0, "temp_exponent": 2.0},
        [p ** (1 / (0.5 + 1.5 * (ENTROPY / math.log(5)) ** 2)) for p in P],
    ),
    ({"mirostat_mode": 2, "mirostat_tau": 0.7}, [0.4, 0, 0, 0, 0]),  # mu = 1.4 bits, p = 0.379
    ({"mirostat_mode": 2, "mirostat_tau": 1.0}, [0.4, 0.3, 0, 0, 0]),  # mu = 2 bits, p = 0.25
    ({"xtc_probability": 1.0, "xtc_threshold": 0.12}, [0, 0, 0.15, 0.1, 0.05]),
    ({"xtc_probability": 1.0, "xtc_threshold": 0.35}, P),  # one alone is the least likely of them
    ({"xtc_probability": 1.0, "xtc_threshold": 0.0}, [0, 0, 0, 0, 0.05]),
]


@pytest.mark.parametrize(("values", "expected"), TABLE, ids=[str(values) for values, _ in TABLE])
def test_a_stage_leaves_what_its_definition_says(values: dict[str, Any], expected: list[float]) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    # Where the tokens stand does not matter.
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        ours = distribution(logits_of(P)[order], draw_of(values))
        assert torch.allclose(ours, (wanted / wanted.sum())[order], atol=1e-6)


WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}


def by_transformers(logits: Tensor, values: dict[str, Any], names: tuple[str, ...]) -> Tensor:
    scores = logits.double()
    for name in names:
        scores = WARPERS[name](values[name])(None, scores)
    return scores.softmax(dim=-1)


@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0, 12.0])
@pytest.mark.parametrize(
    "values",
    [
        {"typical_p": 0.2},
        {"typical_p": 0.95},
        {"epsilon_cutoff": 3e-3},
        {"eta_cutoff": 3e-3},
        {"eta_cutoff": 0.3},
        {"temperature": 0.8, "top_k": 100, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 3e-3},
    ],
)
def test_transformers_leaves_the_same_in_the_same_order(values: dict[str, float], spread: float) -> None:
    logits = random_logits(6, 500, spread=spread)
    draw = draw_of(values)
    ours = distribution(logits, [draw] * 6)
    theirs = by_transformers(logits, values, draw.params.stages)
    assert torch.equal(ours > 0, theirs > 0)
    assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("order", [("min_p", "top_k", "temperature"), ("typical_p", "temperature", "min_p", "top_k")])
def test_another_order_is_another_result_and_that_of_transformers_in_that_order(order: tuple[str, ...]) -> None:
    values = {"temperature": 3.0, "top_k": 60, "min_p": 0.1, "typical_p": 0.7}
    logits = random_logits(6, 500)
    usual = distribution(logits, [draw_of(values)] * 6)
    draw = draw_of({**values, "sampler_order": order})
    ours = distribution(logits, [draw] * 6)
    assert torch.allclose(ours, by_transformers(logits, values, draw.params.stages), atol=1e-12)
    assert not torch.allclose(ours, usual, atol=1e-3)


def test_temperature_last_filters_by_the_probabilities_before_it() -> None:
    values = {"temperature": 5.0, "min_p": 0.3}
    assert (distribution(logits_of(P), draw_of(values)) > 0).sum() == 5
    last = distribution(logits_of(P), draw_of({**values, "temperature_last": True}))
    wanted = torch.tensor([0.4, 0.3, 0.15, 0, 0], dtype=torch.float64) ** 0.2
    wanted[3:] = 0
    assert torch.allclose(last, wanted / wanted.sum(), atol=1e-6)


def test_smoothing_of_one_request_does_not_touch_the_rest_of_the_batch() -> None:
    logits = random_logits(3, 50)
    draws = [draw_of({"temperature": 0.7}), draw_of({"smoothing_factor": 0.2}), draw_of({"temperature": 0.7})]
    together = distribution(logits, draws)
    for row in range(3):
        assert torch.equal(together[row], distribution(logits[row], draws[row]))


def test_xtc_happens_as_often_as_asked_and_by_the_seed_alone() -> None:
    values = {"xtc_probability": 0.3, "xtc_threshold": 0.12}
    happened = [float(distribution(logits_of(P), draw_of(values, seed=seed))[0]) == 0 for seed in range(2000)]
    assert abs(sum(happened) / 2000 - 0.3) < 0.03
    assert happened[:50] == [
        float(distribution(logits_of(P), draw_of(values, seed=seed))[0]) == 0 for seed in range(50)
    ]


def test_xtc_never_drops_an_ignored_token_nor_counts_it() -> None:
    values = {"xtc_probability": 1.0, "xtc_threshold": 0.12}
    left = distribution(logits_of(P), draw_of(values, xtc_ignored=[0]))
    assert (left > 0).tolist() == [True, False, True, True, True]
    left = distribution(logits_of(P), draw_of(values, xtc_ignored=[2, 1]))
    assert (left > 0).tolist() == [True, True, True, True, True]


def test_mirostat_learns_from_each_surprise_and_can_go_back() -> None:
    state = draw_of({"mirostat_mode": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.5}).needed_state
    assert state.mu(0) == 4.0
    state.learn_mu(0, 3.0)
    state.learn_mu(1, 0.0)
    assert (state.mu(0), state.mu(1), state.mu(2), state.mu(9)) == (4.0, 3.5, 4.5, 4.5)
    state.learn_mu(0, 1.0)  # the tokens after the first were taken back
    assert (state.mu(1), state.mu(2)) == (4.5, 4.5)


def test_a_single_token_or_equal_ones_survive_every_stage() -> None:
    values = {
        "smoothing_factor": 0.5, "max_temp": 2.0, "top_k": 1, "top_p": 1e-9, "top_a": 1.0, "min_p": 1.0, "tfs": 1e-9,
        "typical_p": 1e-9, "epsilon_cutoff": 0.99, "eta_cutoff": 0.99, "mirostat_mode": 2, "mirostat_tau": 1e-9,
        "xtc_probability": 1.0, "xtc_threshold": 0.0,
    }  # fmt: skip
    assert draw_of(values).params.stages == DEFAULT_ORDER
    for logits in ([-math.inf, 3.0, -math.inf], [1.0], [2.0, 2.0, 2.0, 2.0], [-1e30, 1e30], [0.0, -math.inf]):
        left = distribution(logits, draw_of(values))
        assert left.isfinite().all()
        assert float(left.sum()) == pytest.approx(1.0)

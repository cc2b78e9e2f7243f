from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from exl2_rag.errors import EngineError
from exl2_rag.llm.request import SamplingParams
from exl2_rag.llm.sampler import Draw, filter_logits, sample, uniform

VOCAB = 600


def rows_of_logits(n: int, *, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def params(**values: float) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **values})  # type: ignore[arg-type]


def by_transformers(logits: torch.Tensor, one: SamplingParams) -> torch.Tensor:
    """Probabilities after transformers' own filters, in its order."""
    scores = TemperatureLogitsWarper(one.temperature)(None, logits.double())  # type: ignore[arg-type]
    if one.top_k:
        scores = TopKLogitsWarper(one.top_k)(None, scores)  # type: ignore[arg-type]
    if one.top_p < 1:
        scores = TopPLogitsWarper(one.top_p)(None, scores)  # type: ignore[arg-type]
    if one.min_p:
        scores = MinPLogitsWarper(one.min_p)(None, scores)  # type: ignore[arg-type]
    return scores.softmax(dim=-1)


@pytest.mark.parametrize("spread", [0.05, 1.0, 3.0, 12.0])
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 100_000},
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.02},
        {"min_p": 1.0},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 300, "top_p": 0.95, "min_p": 0.05},
    ],
)
def test_the_filters_leave_what_those_of_transformers_leave(values: dict[str, float], spread: float) -> None:
    logits = rows_of_logits(5, spread=spread)
    ours = filter_logits(logits, [params(**values)] * 5).softmax(dim=-1)
    theirs = by_transformers(logits, params(**values))
    assert torch.equal(ours > 0, theirs > 0)
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = filter_logits(logits, [params(top_p=0.6)]).isfinite()
    assert kept.tolist() == [[True, True, False, False]]


def test_tokens_as_likely_as_the_kth_are_all_kept() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert filter_logits(logits, [params(top_k=2)]).isfinite().tolist() == [[False, True, True, True, False]]


def test_rows_with_different_parameters_are_filtered_each_by_its_own() -> None:
    logits = rows_of_logits(4)
    each = [params(top_k=3), params(top_p=0.5), params(min_p=0.3), params(temperature=2.0)]
    together = filter_logits(logits, each)
    for row, one in enumerate(each):
        assert torch.equal(together[row], filter_logits(logits[row : row + 1], [one])[0])


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.full((1, VOCAB), -1.0)
    logits[0, [7, 300, 599]] = 2.5
    assert sample(logits, [Draw(SamplingParams(temperature=0), seed=0, step=0)]) == [7]


def test_a_seed_and_step_give_the_same_token_whatever_else_is_in_the_batch() -> None:
    logits = rows_of_logits(8)
    draws = [Draw(params(temperature=1.5, top_p=0.97, top_k=200), seed=row, step=3) for row in range(8)]
    together = sample(logits, draws)
    alone = [sample(logits[row : row + 1], [draws[row]])[0] for row in range(8)]
    assert together == alone
    assert sample(logits.flip(0), draws[::-1]) == together[::-1]


def test_other_steps_and_other_seeds_draw_other_numbers() -> None:
    numbers = {uniform(seed, step) for seed in range(50) for step in range(50)}
    assert len(numbers) == 2500
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(2**63 - 1, 2**40) != uniform(2**63 - 2, 2**40)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.0, 0.15, 0.1])
    draws = [Draw(params(), seed=11, step=step) for step in range(20_000)]
    tokens = sample(probabilities.log().expand(20_000, -1), draws)
    shares = np.bincount(tokens, minlength=5) / 20_000
    assert np.abs(shares - probabilities.numpy()).max() < 0.015
    assert shares[2] == 0


def test_only_allowed_tokens_are_drawn_greedy_or_not() -> None:
    logits = rows_of_logits(1)
    allowed = np.zeros(VOCAB, dtype=np.bool_)
    allowed[[5, 17]] = True
    before = logits.clone()
    for temperature in (0.0, 5.0):
        drawn = {
            sample(logits, [Draw(params(temperature=temperature), seed=1, step=step, allowed=allowed)])[0]
            for step in range(40)
        }
        assert drawn <= {5, 17}
    assert torch.equal(logits, before)


def test_no_allowed_token_is_an_error() -> None:
    nothing = np.zeros(VOCAB, dtype=np.bool_)
    with pytest.raises(EngineError, match="no token that may come next"):
        sample(rows_of_logits(1), [Draw(params(), seed=0, step=0, allowed=nothing)])


def test_logits_that_hold_nan_are_an_error() -> None:
    logits = rows_of_logits(2)
    logits[1, 3] = torch.nan
    with pytest.raises(EngineError, match=r"row 1 .* nan"):
        sample(logits, [Draw(params(temperature=0), seed=0, step=0)] * 2)


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e300])
def test_extreme_temperatures_still_give_a_token(temperature: float) -> None:
    logits = rows_of_logits(1)
    token = sample(logits, [Draw(params(temperature=temperature, top_p=0.9), seed=0, step=0)])[0]
    assert temperature > 1 or token == int(logits.argmax())


def test_a_flat_row_beside_it_does_not_change_what_a_peaked_row_draws() -> None:
    logits = torch.cat([rows_of_logits(1, spread=8.0), rows_of_logits(1, spread=0.01, seed=1)])
    draws = [[Draw(params(top_p=0.97), seed=row, step=step) for row in range(2)] for step in range(50)]
    for pair in draws:
        together = sample(logits, pair)
        assert together == [sample(logits[row : row + 1], [pair[row]])[0] for row in range(2)]

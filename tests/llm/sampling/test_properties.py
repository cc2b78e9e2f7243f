"""What holds for every combination of samplers: something is left, nothing forbidden is, and rows stand alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2_rag.errors import EngineError
from exl2_rag.llm.sampler import choose, sample
from exl2_rag.llm.sampling.params import DEFAULT_ORDER
from tests.cuda_emulation import EmulatedBackend
from tests.llm.sampling.support import distribution, draw_of, logits_of, random_logits

V = 40
unit = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
above = st.sampled_from([0.01, 0.1, 0.5, 0.9, 0.99, 1.0])
ids = st.lists(st.integers(0, V - 1), max_size=6).map(tuple)

VALUES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.01, 0.7, 1.0, 3.0]),
        "max_temp": st.sampled_from([0.0, 0.5, 2.0]),
        "smoothing_factor": unit,
        "smoothing_curve": st.sampled_from([1.0, 2.0, 3.0]),
        "top_k": st.integers(0, V + 2),
        "top_p": above,
        "min_p": unit,
        "top_a": unit,
        "typical_p": above,
        "tfs": above,
        "epsilon_cutoff": unit,
        "eta_cutoff": unit,
        "xtc_probability": st.sampled_from([0.0, 0.5, 1.0]),
        "xtc_threshold": unit,
        "mirostat_mode": st.sampled_from([0, 2]),
        "skew": st.sampled_from([-2.0, 0.0, 0.5, 50.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
        "frequency_penalty": st.sampled_from([-1.0, 0.0, 0.7]),
        "presence_penalty": st.sampled_from([-1.0, 0.0, 0.7]),
        "penalty_range": st.sampled_from([None, 1, 7]),
        "dry_multiplier": unit,
        "no_repeat_ngram_size": st.sampled_from([0, 2, 3]),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5), max_size=4),
        "banned_tokens": ids,
        "min_tokens": st.sampled_from([0, 5, 50]),
        "sampler_order": st.permutations(DEFAULT_ORDER).map(tuple),
        "temperature_last": st.booleans(),
        "logprobs": st.sampled_from([None, 2]),
    },
)
ROWS = st.tuples(VALUES, st.lists(st.integers(0, V - 1), max_size=30), st.sampled_from([0.01, 1.0, 20.0]))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=5), seed=st.integers(0, 2**40))
def test_every_combination_leaves_a_distribution_over_allowed_tokens_and_rows_stand_alone(
    rows: list[tuple[dict[str, Any], list[int], float]], seed: int
) -> None:
    logits = torch.cat([random_logits(1, V, seed + row, spread) for row, (_, _, spread) in enumerate(rows)])
    allowed = np.arange(V) % 3 != 1

    def draws() -> list[Any]:
        return [
            draw_of(values, history, n_prompt=len(history) // 2, seed=seed + row, end_ids=[0], allowed=allowed)
            for row, (values, history, _) in enumerate(rows)
        ]

    left = distribution(logits, draws())
    assert left.sum(dim=-1).tolist() == pytest.approx([1.0] * len(rows))
    together = choose(logits, draws())
    for row, (draw, one) in enumerate(zip(draws(), together, strict=True)):
        out = {*draw.params.banned_tokens, *np.flatnonzero(~allowed).tolist()}
        if draw.step < draw.params.min_tokens:
            out.add(0)
        assert not left[row][list(out)].any()
        assert float(left[row][one.token_id]) > 0
        assert choose(logits[row : row + 1], [draw]) == [one]
        if one.measured is not None:
            assert one.measured.processed == pytest.approx(float(left[row][one.token_id].log()), abs=1e-9)


def test_skew_above_zero_favours_the_unlikely_below_zero_the_likely() -> None:
    logits = logits_of([0.1, 0.5, 0.25, 0.15]).expand(4000, -1)
    shares = {}
    for skew in (-1.0, 0.0, 1.0):
        tokens = sample(logits, [draw_of({"skew": skew}, seed=seed) for seed in range(4000)])
        shares[skew] = np.bincount(tokens, minlength=4) / 4000
    assert shares[-1.0][1] > shares[0.0][1] + 0.1 > shares[1.0][1] + 0.2
    # The most likely token is drawn while u ** exp(-skew) < 0.5.
    for skew, share in shares.items():
        assert share[1] == pytest.approx(0.5 ** np.exp(skew), abs=0.03)


@pytest.mark.parametrize("skew", [0.0, 700.0])
def test_a_number_that_rounds_up_to_one_still_picks_a_token_that_can_come(skew: float) -> None:
    tokens = sample(logits_of([0.7, 0.3, 1e-300])[None], [draw_of({"skew": skew, "top_k": 2})])
    assert tokens[0] in (0, 1)


def test_nan_in_logits_and_an_empty_set_are_errors_that_name_the_row_and_the_reason() -> None:
    logits = random_logits(2, V)
    logits[1, 3] = torch.nan
    draws = [draw_of({"min_p": 0.1, "logprobs": 0})] * 2
    with pytest.raises(EngineError, match=r"row 1 .* nan"):
        choose(logits, draws)
    nothing = [draw_of({"banned_tokens": tuple(range(1, V)), "min_tokens": 3}, end_ids=[0])]
    with pytest.raises(EngineError, match=r"banned_tokens and min_tokens \(after 0 of 3\) together leave none"):
        choose(logits[:1], nothing)
    with pytest.raises(EngineError, match="no_repeat_ngram_size leaves none"):
        choose(logits[:1], [draw_of({"no_repeat_ngram_size": 1}, list(range(V)))])


def test_a_failed_batch_teaches_no_state_anything() -> None:
    logits = random_logits(2, V)
    logits[1] = torch.nan
    draws = [draw_of({"mirostat_mode": 2}) for _ in range(2)]
    with pytest.raises(EngineError):
        choose(logits, draws)
    assert draws[0].needed_state.mu(5) == draws[0].needed_state.mu(0)


def test_a_card_draws_plain_rows_itself_and_leaves_the_others_to_the_host() -> None:
    from exl2_rag.llm.sampler import choose_with

    logits = random_logits(5, V)
    draws = [
        draw_of({"temperature": 0.0}), draw_of({"min_p": 0.1}), draw_of({"tfs": 0.9}),
        draw_of({"repetition_penalty": 1.5}, [1, 2, 3]), draw_of({"temperature": 0.8, "logprobs": 1}),
    ]  # fmt: skip
    assert choose_with(EmulatedBackend(80), logits, draws) == choose(logits, draws)

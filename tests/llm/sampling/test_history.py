"""Penalties, DRY and repeated n-grams: against tables, transformers, and a plain reading of their definitions."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from exl2_rag.llm.sampling.pipeline import prepared
from exl2_rag.llm.sampling.state import TokenHistory
from tests.llm.sampling.support import draw_of, random_logits

LOGITS = [2.0, -1.0, 0.5, 0.0, -3.0, 1.0]


def after(values: dict[str, Any], history: list[int], logits: Any = LOGITS, **more: Any) -> list[float]:
    draw = draw_of(values, history, **more)
    return prepared(torch.tensor([list(logits)]), [draw])[0].tolist()


# Parameters, history, its part that is the prompt, and the logits after.
TABLE: list[tuple[dict[str, Any], list[int], int, list[float]]] = [
    ({"repetition_penalty": 2.0}, [0, 1, 0], 2, [1.0, -2.0, 0.5, 0.0, -3.0, 1.0]),
    ({"repetition_penalty": 0.5}, [0, 1], 2, [4.0, -0.5, 0.5, 0.0, -3.0, 1.0]),
    ({"frequency_penalty": 0.5}, [0, 1, 0, 2, 0], 2, [1.0, -1.0, 0.0, 0.0, -3.0, 1.0]),  # the prompt does not count
    ({"presence_penalty": 0.5}, [0, 1, 0, 2, 0], 2, [1.5, -1.0, 0.0, 0.0, -3.0, 1.0]),
    ({"presence_penalty": -0.5}, [5, 5], 0, [2.0, -1.0, 0.5, 0.0, -3.0, 1.5]),
    ({"repetition_penalty": 2.0, "penalty_range": 1}, [0, 1, 2], 3, [2.0, -1.0, 0.25, 0.0, -3.0, 1.0]),
    # Two in range; of the two before, strength 1 and 1/2.
    (
        {"frequency_penalty": 1.0, "penalty_range": 2, "penalty_decay": 2},
        [4, 0, 1, 2, 2], 0, [1.5, -2.0, -1.5, 0.0, -3.0, 1.0],
    ),
    (
        {"repetition_penalty": 2.0, "penalty_range": 1, "penalty_decay": 2},
        [0, 1, 2], 0, [2.0 / 1.5, -2.0, 0.25, 0.0, -3.0, 1.0],
    ),
    ({"repetition_penalty": 2.0, "frequency_penalty": 0.5}, [0], 0, [0.5, -1.0, 0.5, 0.0, -3.0, 1.0]),
    ({"repetition_penalty": 2.0}, [0, 99], 0, [1.0, -1.0, 0.5, 0.0, -3.0, 1.0]),  # an id past the logits
    ({"repetition_penalty": 2.0, "presence_penalty": 1.0}, [], 0, LOGITS),
    # "0 1 2 … 0 1": 2 would lengthen a repetition of two.
    ({"dry_multiplier": 1.0, "dry_base": 3.0}, [0, 1, 2, 5, 0, 1], 6, [2.0, -1.0, -0.5, 0.0, -3.0, 1.0]),
    ({"dry_multiplier": 1.0, "dry_base": 3.0}, [3, 0, 1, 2, 5, 3, 0, 1], 4, [2.0, -1.0, -2.5, 0.0, -3.0, 1.0]),
    ({"dry_multiplier": 1.0, "dry_base": 3.0}, [1, 2, 5, 0, 1], 5, LOGITS),  # one alone is allowed
    ({"dry_multiplier": 1.0, "dry_base": 3.0, "dry_range": 5}, [3, 0, 1, 2, 5, 3, 0, 1], 4, LOGITS),
    # The longest repetition before a token counts, not the sum: "0 1 → 2" and "3 0 1 → 2"; "0 1 → 4".
    (
        {"dry_multiplier": 1.0, "dry_base": 3.0},
        [0, 1, 2, 3, 0, 1, 2, 0, 1, 4, 3, 0, 1], 0, [2.0, -1.0, -2.5, 0.0, -4.0, 1.0],
    ),
    ({"no_repeat_ngram_size": 1}, [0, 4], 2, [-np.inf, -1.0, 0.5, 0.0, -np.inf, 1.0]),
    ({"no_repeat_ngram_size": 2}, [0, 4, 0, 2, 0], 2, [2.0, -1.0, -np.inf, 0.0, -np.inf, 1.0]),
    ({"no_repeat_ngram_size": 4}, [0, 4], 2, LOGITS),
    ({"logit_bias": {0: -2.0, 3: 4.5}}, [], 0, [0.0, -1.0, 0.5, 4.5, -3.0, 1.0]),
    ({"banned_tokens": (0, 5)}, [], 0, [-np.inf, -1.0, 0.5, 0.0, -3.0, -np.inf]),
    ({"allowed_tokens": (0, 5, 2), "banned_tokens": (5,)}, [], 0, [2.0, *[-np.inf], 0.5, *[-np.inf] * 3]),
]  # fmt: skip


@pytest.mark.parametrize(("values", "history", "n_prompt", "expected"), TABLE)
def test_logits_change_as_the_definition_says(
    values: dict[str, Any], history: list[int], n_prompt: int, expected: list[float]
) -> None:
    assert after(values, history, n_prompt=n_prompt) == pytest.approx(expected, abs=1e-12)


def test_end_ids_are_kept_off_until_there_are_min_tokens_new_ones() -> None:
    for n_new in range(4):
        left = after({"min_tokens": 2}, [0] * (3 + n_new), n_prompt=3, end_ids=[1, 4])
        assert [place for place, value in enumerate(left) if value == -np.inf] == ([1, 4] if n_new < 2 else [])


@pytest.mark.parametrize("seed", range(5))
def test_transformers_penalises_and_bans_the_same(seed: int) -> None:
    rng = random.Random(seed)
    history = [rng.randrange(12) for _ in range(rng.randrange(3, 60))]
    logits = random_logits(1, 12, seed=seed)
    ids = torch.tensor([history])
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.double())[0].tolist()
    assert after({"repetition_penalty": 1.3}, history, logits[0].tolist()) == pytest.approx(theirs, abs=1e-12)
    for size in (1, 2, 3):
        theirs = NoRepeatNGramLogitsProcessor(size)(ids, logits.double())[0].tolist()
        assert after({"no_repeat_ngram_size": size}, history, logits[0].tolist()) == theirs


def dry_by_definition(history: list[int], allowed: int, base: float, breakers: set[int]) -> dict[int, float]:
    taken: dict[int, float] = {}
    for place in range(len(history) - 1):
        length = 0
        while (
            length <= place
            and history[place - length] == history[-1 - length]
            and history[place - length] not in breakers
        ):
            length += 1
        if length >= allowed:
            token = history[place + 1]
            taken[token] = max(taken.get(token, 0.0), base ** (length - allowed))
    return taken


@pytest.mark.parametrize("seed", range(60))
def test_dry_takes_what_a_plain_reading_of_it_takes(seed: int) -> None:
    rng = random.Random(seed)
    n_kinds = rng.choice((1, 2, 3, 5))
    history = [rng.randrange(n_kinds) for _ in range(rng.randrange(0, 40))]
    allowed, breakers = rng.choice((1, 2, 3)), set(rng.sample(range(5), rng.choice((0, 0, 1))))
    values = {"dry_multiplier": 0.5, "dry_base": 1.2, "dry_allowed_length": allowed}
    ours = after(values, history, [0.0] * 6, breakers=breakers)
    taken = dry_by_definition(history, allowed, 1.2, breakers)
    assert ours == pytest.approx([-0.5 * taken.get(token, 0.0) for token in range(6)], abs=1e-9)


def test_a_very_long_repetition_stays_finite_and_rules_its_token_out() -> None:
    ours = after({"dry_multiplier": 0.8, "dry_base": 1.75}, [3] * 5000)
    assert np.isfinite(ours).all()
    assert ours[3] < -1e6


def test_two_requests_with_the_same_parameters_do_not_influence_each_other() -> None:
    first = draw_of({"dry_multiplier": 1.0, "repetition_penalty": 2.0}, [0, 1, 2, 5, 0, 1])
    second = draw_of({"dry_multiplier": 1.0, "repetition_penalty": 2.0}, [4])
    assert first.params == second.params
    rows = torch.tensor([LOGITS, LOGITS])
    together = prepared(rows, [first, second])
    assert torch.equal(together[1], prepared(rows[:1], [second])[0])
    assert together[1].tolist() == pytest.approx([2.0, -1.0, 0.5, 0.0, -6.0, 1.0])


@pytest.mark.parametrize("seed", range(5))
def test_a_history_that_went_back_and_on_is_the_history_it_reads_as(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [1, 2, 3]
    history = TokenHistory(tokens)
    for _ in range(300):
        if rng.random() < 0.3:
            length = rng.randrange(len(tokens) + 1)
            del tokens[length:]
            history.truncate(length)
        else:
            tokens += [rng.randrange(100) for _ in range(rng.randrange(4))]
            history.follow(tokens)
        assert history.last().tolist() == tokens
        assert history.last(5).tolist() == tokens[-5:]


def test_a_fork_has_the_same_past_and_its_own_future() -> None:
    draw = draw_of({"repetition_penalty": 2.0, "mirostat_mode": 2}, [0, 1])
    state = draw.needed_state
    twin = state.fork()
    state.history.follow([0, 1, 2])
    twin.history.follow([0, 1, 5, 5])
    state.learn_mu(0, 1.0)
    assert state.history.last().tolist() == [0, 1, 2]
    assert twin.history.last().tolist() == [0, 1, 5, 5]
    assert twin.mu(1) == 10.0


def test_a_repetition_does_not_reach_over_a_breaker() -> None:
    values, history = {"dry_multiplier": 1.0, "dry_base": 3.0}, [3, 0, 1, 2, 5, 3, 0, 1]
    assert after(values, history, breakers=[4]) == pytest.approx([2.0, -1.0, -2.5, 0.0, -3.0, 1.0])
    assert after(values, history, breakers=[3]) == pytest.approx([2.0, -1.0, -0.5, 0.0, -3.0, 1.0])
    for breakers in ([0], [1]):
        assert after(values, history, breakers=breakers) == LOGITS

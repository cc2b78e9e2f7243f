from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from exl2_rag import SamplingParams
from exl2_rag.errors import ContextOverflowError, EngineError, RequestError
from tests.llm.test_engine import OneOf, ask, greedy, prompt, run
from tests.support.toy_model import VOCAB, ToyModel, expected_tokens, toy_engine, toy_logits

PROMPT, NEGATIVE = prompt(3, 20), tuple(prompt(4, 33))


def guided(n: int, scale: float = 2.0, negative: tuple[int, ...] | None = NEGATIVE, **more: Any) -> SamplingParams:
    return greedy(n, cfg_scale=scale, negative_prompt=negative, **more)


def mixed(tokens: list[int], negative: tuple[int, ...], new: list[int], scale: float) -> torch.Tensor:
    with_prompt = toy_logits([*tokens, *new]).double().log_softmax(dim=-1)
    without = toy_logits([*negative, *new]).double().log_softmax(dim=-1)
    return scale * with_prompt + (1 - scale) * without


def expected_guided(tokens: list[int], negative: tuple[int, ...], scale: float, n: int) -> list[int]:
    new: list[int] = []
    for _ in range(n):
        new.append(int(mixed(tokens, negative, new, scale).argmax()))
    return new


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 3.0])
def test_tokens_are_those_of_the_mixed_log_probabilities(scale: float) -> None:
    engine = toy_engine()
    outcome = run(engine, ask(engine, PROMPT, guided(12, scale)))[0]
    assert outcome.token_ids == expected_guided(PROMPT, NEGATIVE, scale, 12)
    assert outcome.token_ids != expected_tokens(PROMPT, 12)


def test_without_a_negative_prompt_it_is_the_last_prompt_token() -> None:
    engine = toy_engine()
    outcome = run(engine, ask(engine, PROMPT, guided(8, negative=None)))[0]
    assert outcome.token_ids == expected_guided(PROMPT, (PROMPT[-1],), 2.0, 8)


def test_both_halves_decode_in_the_same_step_find_their_prefix_and_are_counted() -> None:
    model = ToyModel()
    engine = toy_engine(model)
    first = run(engine, ask(engine, PROMPT, guided(12)))[0]
    usage = first.last.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (20 + 33, 0, 12)
    before, steps = model.n_computed, model.n_steps
    again = run(engine, ask(engine, PROMPT, guided(12)))[0]
    assert again.token_ids == first.token_ids
    assert again.last.usage is not None
    assert again.last.usage.cached_tokens == 19 + 32
    assert model.n_computed - before == 2 + 2 * 11
    assert model.n_steps - steps == 12
    assert engine.report().running_pages == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_crowd_on_a_tiny_cache_changes_no_token_and_ends(seed: int) -> None:
    rng = random.Random(seed)
    engine = toy_engine(n_pages=24, max_seq_len=40, max_batch_size=rng.choice((2, 3, 4)), max_batched_tokens=8)
    jobs = []
    for _ in range(8):
        tokens = [rng.randrange(1, 4) for _ in range(rng.randrange(1, 15))]
        negative = tuple(rng.randrange(1, 4) for _ in range(rng.randrange(1, 15)))
        is_guided, n = rng.random() < 0.6, rng.randrange(1, 15)
        expected = expected_guided(tokens, negative, 2.0, n) if is_guided else expected_tokens(tokens, n)
        how = guided(n, negative=negative) if is_guided else greedy(n)
        jobs.append((ask(engine, tokens, how), expected))
    outcomes = run(engine, *[sequence for sequence, _ in jobs])
    for outcome, (_, expected) in zip(outcomes, jobs, strict=True):
        assert outcome.error is None
        assert outcome.token_ids == expected
    report = engine.report()
    assert (report.running_pages, report.running_requests, report.waiting_requests) == (0, 0, 0)


def test_a_constraint_and_forced_tokens_hold_under_guidance() -> None:
    engine = toy_engine()
    options = ([70, 1, 2, 3, 80], [70, 1, 2, 3, 81], [71, 6, 80], [71, 6, 81])
    outcome = run(engine, ask(engine, PROMPT, guided(12), OneOf(*options)))[0]
    assert outcome.token_ids in options
    first, last = outcome.token_ids[0], outcome.token_ids[-1]
    assert first == max((70, 71), key=lambda token: float(mixed(PROMPT, NEGATIVE, [], 2.0)[token]))
    scores = mixed(PROMPT, NEGATIVE, outcome.token_ids[:-1], 2.0)
    assert last == max((80, 81), key=lambda token: float(scores[token]))


def test_several_continuations_are_guided_each_with_its_own_seed() -> None:
    engine = toy_engine()
    how = SamplingParams(
        max_tokens=10, temperature=1.5, seed=7, n=3, cfg_scale=1.5, negative_prompt=NEGATIVE, ignore_eos=True
    )
    sequence = ask(engine, PROMPT, how)
    outcomes = run(engine, sequence, *sequence.branches)
    texts = {tuple(outcome.token_ids) for outcome in outcomes}
    assert len(texts) == 3
    one = toy_engine()
    for outcome, branch in zip(outcomes, (sequence, *sequence.branches), strict=True):
        alone = SamplingParams(
            max_tokens=10, temperature=1.5, seed=branch.seed, cfg_scale=1.5, negative_prompt=NEGATIVE, ignore_eos=True
        )
        assert run(one, ask(one, PROMPT, alone))[0].token_ids == outcome.token_ids
    assert engine.report().running_pages == 0


@pytest.mark.parametrize("after_steps", range(6))
def test_a_cancelled_one_leaves_nothing_behind(after_steps: int) -> None:
    engine = toy_engine(max_batched_tokens=16)
    doomed, other = ask(engine, PROMPT, guided(12)), ask(engine, prompt(5, 9))
    for _ in range(after_steps):
        engine.step()
    engine.abort(doomed)
    report = engine.report()
    assert report.running_requests + report.waiting_requests == 1
    run(engine, other)
    assert engine.report().running_pages == 0


def test_a_failing_half_ends_its_own_request_alone() -> None:
    model = ToyModel()
    engine = toy_engine(model)
    model.nan_after = 96
    doomed = ask(engine, PROMPT, guided(12, negative=(5, 96)))
    fine = ask(engine, prompt(5, 9), greedy(6))
    failed, other = run(engine, doomed, fine)
    assert isinstance(failed.error, EngineError)
    assert other.token_ids == expected_tokens(prompt(5, 9), 6)
    assert engine.report().running_pages == 0


def test_pins_that_leave_room_for_one_half_only_are_an_error_not_a_standstill() -> None:
    engine = toy_engine(n_pages=20, max_seq_len=40)
    pinned = engine.prepare_prompt(tuple(prompt(9, 39)), keep_pages=True)
    engine.add(pinned)
    run(engine, pinned)
    outcome = run(engine, ask(engine, PROMPT, guided(5)))[0]
    assert isinstance(outcome.error, EngineError)
    assert "pinned" in str(outcome.error)


@pytest.mark.parametrize(
    ("sizes", "how", "error", "message"),
    [
        ({"max_batch_size": 1}, guided(5), RequestError, "max_batch_size is 1"),
        ({"n_pages": 14, "max_seq_len": 50}, guided(5), ContextOverflowError, "20 and 33 tokens"),
        ({"max_seq_len": 33}, guided(5), ContextOverflowError, "33"),
        ({}, guided(5, negative=(VOCAB,)), RequestError, f"from 0 to {VOCAB - 1}"),
        ({}, greedy(5, cfg_scale=2.0, negative_prompt="text"), RequestError, "as token ids"),
        ({}, greedy(5, cfg_scale=2.0, negative_prompt=({"role": "user"},)), RequestError, "as token ids"),
    ],
)
def test_what_cannot_be_guided_is_refused_at_once(
    sizes: dict[str, int], how: SamplingParams, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask(toy_engine(**sizes), PROMPT, how)


def test_guidance_with_samplers_and_logprobs_measures_the_prompt_s_own_logits() -> None:
    engine = toy_engine()
    how = guided(4, logprobs=1, repetition_penalty=1.5)
    outcome = run(engine, ask(engine, PROMPT, how))[0]
    new: list[int] = []
    for one in [one for piece in outcome.pieces for one in piece.logprobs or ()]:
        raw = toy_logits([*PROMPT, *new]).double().log_softmax(dim=-1)
        assert one.logprob == pytest.approx(float(raw[one.token_id]), abs=1e-9)
        scores = mixed(PROMPT, NEGATIVE, new, 2.0)
        seen = np.unique([*PROMPT, *new])
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * 1.5, scores[seen] / 1.5)
        assert one.token_id == int(scores.argmax())
        new.append(one.token_id)

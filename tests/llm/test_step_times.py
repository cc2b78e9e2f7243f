"""Prefill beside decode keeps to the promised gap, on machines that are simulated: a cost of each step, and noise."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from exl2_rag.errors import SettingsError
from exl2_rag.llm.engine_config import EngineOptions, ModelShape, resolve
from exl2_rag.llm.sequence import Sequence
from exl2_rag.llm.step_times import LEAST_TOKENS, StepTimes
from tests.llm.test_scheduler import distinct, request, scheduler
from tests.support.toy_model import expected_tokens, toy_engine

Cost = Callable[[int, list[tuple[int, int]]], float]


def machine(weights_s: float, row_s: float, key_s: float) -> Cost:
    """Seconds of a step: reading the weights, or computing the rows if that takes longer; and attention."""

    def cost(n_decoded: int, slices: list[tuple[int, int]]) -> float:
        rows = n_decoded + sum(n for _, n in slices)
        keys = sum(n * (start + n / 2) for start, n in slices)
        return max(weights_s, rows * row_s) + 0.1 * weights_s * n_decoded + keys * key_s

    return cost


MACHINES = {
    "slow attention": machine(0.025, 0.003, 2e-6),
    "a processor": machine(0.025, 0.003, 2e-7),
    "a card": machine(0.006, 2e-5, 2e-10),
}


def decode(times: StepTimes, cost: Cost, n_decoded: int, steps: int = 5) -> float:
    for _ in range(steps):
        times.add(n_decoded, [], cost(n_decoded, []))
    return cost(n_decoded, [])


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("max_gap", [2.0, 3.0, 6.0])
def test_no_step_beside_an_8k_prompt_is_longer_than_promised(name: str, max_gap: float) -> None:
    cost, rng = MACHINES[name], random.Random(1)
    times = StepTimes(max_gap)
    for start in (0, 512):  # what the streams' own prompts told
        times.add(0, [(start, 512)], cost(0, [(start, 512)]))
    usual = decode(times, cost, 4)
    start, worst, n_steps = 0, 0.0, 0
    while start < 8192:
        budget = times.budget(4, min(2048, 8192 - start), 128)
        n = budget.most(start)
        slices = [(start, n)] if n else []
        seconds = cost(4, slices) * rng.uniform(0.97, 1.03)
        times.add(4, slices, seconds)
        if n > LEAST_TOKENS:
            worst = max(worst, seconds / usual)
        start += n
        n_steps += 1
        assert n_steps < 8192 / LEAST_TOKENS + 200
    assert worst <= max_gap


def test_much_of_what_is_promised_is_used() -> None:
    cost = MACHINES["a processor"]
    times = StepTimes(3.0)
    times.add(0, [(0, 512)], cost(0, [(0, 512)]))
    usual = decode(times, cost, 4)
    spent = []
    start = 0
    for _ in range(200):
        n = times.budget(4, 512, 128).most(start)
        slices = [(start, n)] if n else []
        spent.append(cost(4, slices) / usual)
        times.add(4, slices, cost(4, slices))
        start += n
    assert sum(spent[20:]) / len(spent[20:]) > 1.6


def test_a_machine_that_becomes_slow_gets_less_to_do_within_a_few_steps() -> None:
    cost = MACHINES["a processor"]
    times = StepTimes(3.0)
    times.add(0, [(0, 512)], cost(0, [(0, 512)]))
    usual = decode(times, cost, 4)
    for step in range(60):
        n = times.budget(4, 512, 128).most(0)
        slow = 3.0 if step >= 40 else 1.0
        seconds = usual + slow * (cost(4, [(0, n)]) - usual) if n else usual
        times.add(4, [(0, n)] if n else [], seconds)
        if step >= 46:
            assert seconds <= 3 * usual


def test_what_is_usual_is_looked_at_first_and_again_now_and_then() -> None:
    times = StepTimes(3.0)
    times.add(0, [(0, 512)], 1.5)
    n_held = 0
    for step in range(300):
        budget = times.budget(2, 512, 128)
        n = budget.most(0)
        assert budget.is_spent == (n == 0)
        assert (n == 0) if step == 0 else True
        n_held += n == 0
        times.add(2, [(0, n)] if n else [], 0.03 + 0.003 * n)
    assert n_held == 5


def test_without_measurements_tokens_decide_and_nothing_is_held_back_twice() -> None:
    times = StepTimes(3.0)
    assert times.budget(2, 512, 128).most(0) == 0
    for _ in range(200):
        assert times.budget(2, 512, 128).most(0) == 128
    assert times.budget(2, 50, 128).most(0) == 50


def test_a_prompt_gets_on_though_every_token_is_too_dear() -> None:
    times = StepTimes(3.0)
    times.add(0, [(0, 512)], 500.0)
    decode(times, MACHINES["a card"], 2)
    budget = times.budget(2, 512, 128)
    assert budget.most(0) == LEAST_TOKENS
    budget.spend(0, LEAST_TOKENS)
    assert budget.is_spent
    assert budget.most(0) == 0


def test_several_prompts_share_the_time_of_a_step() -> None:
    cost = MACHINES["a card"]
    times = StepTimes(3.0)
    for n in (100, 500, 1000):
        times.add(0, [(0, n)], cost(0, [(0, n)]))
    usual = decode(times, cost, 4)
    times.add(4, [(0, 400)], cost(4, [(0, 400)]))
    budget = times.budget(4, 2048, 512)
    slices = []
    for _ in range(3):
        n = min(100, budget.most(0))
        budget.spend(0, n)
        slices.append((0, n))
    assert slices == [(0, 100)] * 3
    assert cost(4, slices) <= 3 * usual


# --- in the scheduler and the engine ---------------------------------------------------------------------------------


def test_the_scheduler_cuts_prompts_by_the_times_it_is_told() -> None:
    one = scheduler(max_inter_token_gap=3.0, max_batched_tokens=20, prefill_beside_decode=8)
    first = request(distinct(1, 20))
    one.add(first)

    def step() -> list[tuple[int, int]]:
        plan = one.plan()
        one.complete(plan)
        n_prefill = sum(part.n_tokens for part in plan.slices if not part.decodes)
        one.measured(plan, 0.010 + 0.001 * n_prefill)
        for part in plan.slices:
            if part.reaches_end:
                part.sequence.token_ids.append(9)
        return [(part.sequence.arrival, part.n_tokens) for part in plan.slices]

    assert step() == [(0, 20)]
    one.add(request(distinct(2, 200)))
    assert step() == [(0, 1)]  # to see what is usual
    for _ in range(10):
        decoded, (who, n) = step()
        assert (decoded, who) == ((0, 1), 1)
        assert 0.010 + 0.001 * n <= 0.030
    assert n >= 7


def test_prompts_and_decoding_take_turns_where_that_is_asked_for() -> None:
    one = scheduler(max_inter_token_gap=3.0, max_batched_tokens=20, prefill_in_turns=True)
    one.add(request(distinct(1, 20)))

    def step() -> list[tuple[int, int]]:
        plan = one.plan()
        one.complete(plan)
        one.measured(plan, 0.010 if plan.slices[0].decodes else 0.001 * sum(part.n_tokens for part in plan.slices))
        for part in plan.slices:
            if part.reaches_end:
                part.sequence.token_ids.append(9)
        return [(part.sequence.arrival, part.n_tokens) for part in plan.slices]

    assert step() == [(0, 20)]
    one.add(request(distinct(2, 200)))
    for _ in range(10):
        assert step() == [(0, 1)]
        ((who, n),) = step()
        assert who == 1
        assert 0.010 + 0.001 * n <= 0.030
    assert n >= 7
    one.remove(one.running[1])
    assert step() == [(0, 1)]
    assert step() == [(0, 1)]  # nobody's turn is left empty


def test_a_sequence_with_much_to_catch_up_does_not_hold_up_the_others() -> None:
    one = scheduler()
    sequences: list[Sequence] = [request(distinct(n, 4)) for n in (1, 2)]
    for sequence in sequences:
        one.add(sequence)
    plan = one.plan()
    one.complete(plan)
    sequences[0].token_ids += [7] * 40
    sequences[1].token_ids.append(7)
    plan = one.plan()
    assert [(part.sequence.arrival, part.n_tokens, part.decodes) for part in plan.slices] == [
        (1, 1, True),
        (0, 8, False),
    ]


def test_the_engine_gives_the_same_tokens_however_prompts_are_cut() -> None:
    from tests.llm.test_priorities import ask

    for gap, in_turns in ((None, False), (None, True), (1.5, False), (3.0, False), (3.0, True), (50.0, True)):
        engine = toy_engine(max_inter_token_gap=gap, prefill_in_turns=in_turns)
        sequences = [ask(engine, [n, *range(1, 60)], 20) for n in range(6)]
        while engine.has_work:
            engine.step()
        for n, sequence in enumerate(sequences):
            assert sequence.token_ids[60:] == expected_tokens([n, *range(1, 60)], 20)


@pytest.mark.parametrize("gap", [0.5, 1.0])
def test_a_promise_that_leaves_no_time_for_prompts_is_refused(gap: float) -> None:
    shape = ModelShape(max_seq_len=512, cache_elements_per_token=64, fp32_weights=True)
    with pytest.raises(SettingsError, match=r"max_inter_token_gap must be at least 1\.5"):
        resolve(EngineOptions(max_inter_token_gap=gap), shape, free_bytes=10**9)
    assert resolve(EngineOptions(), shape, free_bytes=10**9).max_inter_token_gap == 3.0
    assert resolve(EngineOptions(max_inter_token_gap=None), shape, free_bytes=10**9).max_inter_token_gap is None

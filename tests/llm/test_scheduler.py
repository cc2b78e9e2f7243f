from __future__ import annotations

import random

import pytest

from exl2_rag.errors import EngineError
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.page_table import PageTable
from exl2_rag.llm.page_table_check import check_integrity
from exl2_rag.llm.request import SamplingParams
from exl2_rag.llm.scheduler import Scheduler, StepPlan
from exl2_rag.llm.sequence import Sequence, State


def scheduler(**sizes: int) -> Scheduler:
    config = EngineConfig(
        **{
            "max_seq_len": 400,
            "n_pages": 100,
            "page_size": 4,
            "max_batch_size": 4,
            "max_batched_tokens": 20,
            "prefill_beside_decode": 8,
            **sizes,
        }
    )
    return Scheduler(PageTable(config.n_pages, config.page_size), config)


def request(token_ids: list[int] | range, **options: object) -> Sequence:
    return Sequence(tuple(token_ids), max_new_tokens=100, sampling=SamplingParams(), **options)  # type: ignore[arg-type]


def step(one: Scheduler) -> StepPlan:
    """Plan a step, pretend to compute it, and sample token 9 wherever the end is reached."""
    plan = one.plan()
    check_integrity(one.table)
    assert sum(part.n_tokens for part in plan.slices) <= 20
    one.complete(plan)
    for part in plan.slices:
        if part.reaches_end:
            part.sequence.token_ids.append(9)
    check_integrity(one.table)
    for sequence in one.running:
        assert sequence.held is not None
        held = [token for index in sequence.held.pages for token in one.table.pages[index].token_ids]
        assert held == sequence.token_ids[: sequence.n_computed]
    return plan


def lengths(plan: StepPlan) -> list[tuple[int, int]]:
    """(arrival, tokens) of each slice."""
    return [(part.sequence.arrival, part.n_tokens) for part in plan.slices]


def distinct(first: int, length: int) -> list[int]:
    """A prompt that shares no beginning with one of another `first`."""
    return [first, *range(100, 99 + length)]


def test_a_long_prompt_is_computed_in_slices_within_the_budget() -> None:
    one = scheduler()
    one.add(request(distinct(1, 50)))
    assert [lengths(step(one)) for _ in range(4)] == [[(0, 20)], [(0, 20)], [(0, 10)], [(0, 1)]]


def test_decoding_comes_first_and_prefill_beside_it_is_short() -> None:
    one = scheduler()
    one.add(request(distinct(1, 5)))
    step(one)
    one.add(request(distinct(2, 50)))
    assert lengths(step(one)) == [(0, 1), (1, 8)]
    assert lengths(step(one)) == [(0, 1), (1, 8)]


def test_short_prompts_share_a_step_in_order_of_arrival() -> None:
    one = scheduler()
    for first in (1, 2, 3):
        one.add(request(distinct(first, 8)))
    assert lengths(step(one)) == [(0, 8), (1, 8), (2, 4)]
    assert lengths(step(one)) == [(0, 1), (1, 1), (2, 4)]


def test_no_more_run_than_the_batch_allows() -> None:
    one = scheduler(max_batch_size=2)
    sequences = [request(distinct(first, 3)) for first in (1, 2, 3)]
    for sequence in sequences:
        one.add(sequence)
    step(one)
    assert [sequence.state for sequence in sequences] == [State.RUNNING, State.RUNNING, State.WAITING]
    one.remove(sequences[0])
    step(one)
    assert sequences[2].state is State.RUNNING


def test_pages_are_taken_as_a_sequence_grows() -> None:
    one = scheduler()
    sequence = request(distinct(1, 4))
    one.add(sequence)
    step(one)
    assert sequence.held is not None
    assert len(sequence.held.pages) == 1
    step(one)
    assert len(sequence.held.pages) == 2


def test_requests_with_one_prefix_wait_for_the_one_that_computes_it() -> None:
    one = scheduler(max_batch_size=16, max_batched_tokens=20)
    prefix = distinct(7, 64)
    sequences = [request([*prefix, 200 + n]) for n in range(16)]
    for sequence in sequences:
        one.add(sequence)
    n_computed = 0
    while any(not sequence.is_decoding for sequence in sequences):
        n_computed += sum(part.n_tokens for part in step(one).slices)
        assert n_computed < 64 + 16 + 50  # the prefix once, the rest of each, and a few decoded tokens
    held = [sequence.held for sequence in sequences if sequence.held is not None]
    assert len({tuple(pages.pages[:16]) for pages in held}) == 1
    assert one.table.counts().running == 16 + 16
    assert [sequence.n_cached_tokens for sequence in sequences] == [0] + [64] * 15


def test_a_short_common_beginning_is_not_waited_for() -> None:
    one = scheduler()
    one.add(request([1, 2, 3, *range(50, 55)]))
    one.add(request([1, 2, 3, *range(60, 65)]))
    assert lengths(step(one)) == [(0, 8), (1, 8)]


def test_one_that_waits_for_a_prefix_goes_on_when_the_computing_one_is_cancelled() -> None:
    one = scheduler()
    first, second = request(distinct(1, 60)), request(distinct(1, 50))
    one.add(first)
    one.add(second)
    step(one)
    assert second.state is State.WAITING
    one.remove(first)
    step(one)
    assert second.state is State.RUNNING
    assert second.n_cached_tokens == 20


def test_one_that_waits_for_a_prefix_keeps_its_place() -> None:
    one = scheduler(max_batch_size=2)
    prefix = distinct(1, 60)
    sequences = [request(prefix), request([*prefix, 5]), request(distinct(2, 3))]
    for sequence in sequences:
        one.add(sequence)
    step(one)
    assert sequences[2].state is State.WAITING


def test_the_youngest_gives_up_its_pages_and_comes_back() -> None:
    one = scheduler(n_pages=8)
    first, second = request(distinct(1, 9)), request(distinct(2, 9))
    one.add(first)
    one.add(second)
    while not one.n_preemptions:
        step(one)
    assert second.state is State.WAITING
    assert second.held is None
    assert not second.is_decoding  # what it computes anew is prefill, and has no right of way
    n_tokens = len(second.token_ids)
    one.remove(first)
    step(one)
    assert second.state is State.RUNNING
    assert len(second.token_ids) >= n_tokens
    for _ in range(5):
        step(one)
    assert second.is_decoding
    assert second.n_cached_tokens == 0  # what it found again was its own


def test_the_youngest_waits_in_place_while_others_may_still_free_pages() -> None:
    one = scheduler(n_pages=6)
    first, second = request(distinct(1, 4)), request(distinct(2, 11))
    one.add(first)
    one.add(second)
    for _ in range(40):
        if len(first.token_ids) > 13:
            break
        step(one)
        assert first.state is State.RUNNING
    assert len(first.token_ids) > 13


def test_nobody_is_admitted_before_an_older_one_has_what_it_needs() -> None:
    one = scheduler(n_pages=10)
    one.add(request(distinct(1, 20)))
    step(one)
    big, small = request(distinct(2, 30)), request(distinct(3, 2))
    one.add(big)
    one.add(small)
    for _ in range(5):
        step(one)
    assert big.state is State.WAITING
    assert small.state is State.WAITING


def test_a_prompt_that_finds_no_room_beside_pins_fails_and_says_why() -> None:
    one = scheduler(n_pages=8)
    pinned = request(distinct(1, 24))
    one.add(pinned)
    step(one)
    step(one)
    one.pin(pinned)
    late = request(distinct(2, 12))
    one.add(late)
    plan = step(one)
    assert [sequence for sequence, _ in plan.failures] == [late]
    assert isinstance(plan.failures[0][1], EngineError)
    assert "6 of 8 pages of 4 tokens are pinned" in str(plan.failures[0][1])
    one.unpin(pinned)
    again = request(distinct(2, 12))
    one.add(again)
    assert lengths(step(one)) == [(2, 12)]


def test_a_sequence_that_outgrows_what_pins_leave_fails_alone() -> None:
    one = scheduler(n_pages=8)
    pinned = request(distinct(1, 20))
    one.add(pinned)
    step(one)
    one.pin(pinned)
    growing = request(distinct(2, 6))
    one.add(growing)
    failures = []
    for _ in range(20):
        failures += step(one).failures
    assert [sequence for sequence, _ in failures] == [growing]
    assert growing.state is State.ENDED
    assert one.table.counts().pinned == 5


def test_removing_twice_is_harmless() -> None:
    one = scheduler()
    waiting, running = request(distinct(1, 3)), request(distinct(2, 3))
    one.add(running)
    step(one)
    one.add(waiting)
    for sequence in (waiting, running):
        one.remove(sequence)
        one.remove(sequence)
    assert not one.running
    assert not one.waiting
    assert one.table.n_available == 100


@pytest.mark.parametrize("seed", range(5))
def test_any_load_is_finished_and_the_oldest_always_gets_on(seed: int) -> None:
    rng = random.Random(seed)
    one = scheduler(n_pages=12)
    sequences: list[Sequence] = []
    goals: dict[Sequence, int] = {}
    for _ in range(2000):
        if len(sequences) < 60 and rng.random() < 0.3:
            sequence = request([rng.choice((1, 2)) for _ in range(rng.randrange(1, 30))])
            goals[sequence] = min(44, len(sequence.token_ids) + rng.randrange(1, 15))
            sequences.append(sequence)
            one.add(sequence)
        unfinished = [sequence for sequence in sequences if sequence.state is not State.ENDED]
        if not unfinished:
            if len(sequences) == 60:
                break
            continue
        plan = step(one)
        assert not plan.failures
        assert any(part.sequence is unfinished[0] for part in plan.slices)
        for sequence in unfinished:
            if len(sequence.token_ids) >= goals[sequence] or rng.random() < 0.01:
                one.remove(sequence)
    assert len(sequences) == 60
    assert all(sequence.state is State.ENDED for sequence in sequences)
    assert one.n_preemptions > 0
    assert one.table.n_available == 12

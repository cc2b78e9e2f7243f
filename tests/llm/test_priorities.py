"""Who is served first, who has to wait, and how long: priorities, the queue's limit, deadlines."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from exl2_rag.errors import EngineError, QueueFullError, RequestError, RequestTimeoutError
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.page_table_check import check_integrity
from exl2_rag.llm.request import GenerationRequest, SamplingParams
from exl2_rag.llm.scheduler import Scheduler
from exl2_rag.llm.sequence import Sequence, State
from tests.llm.test_engine import greedy, prompt, run
from tests.llm.test_scheduler import distinct, lengths, request, scheduler, step
from tests.support.toy_model import ToyModel, expected_tokens, toy_engine


def order_of_admission(one: Scheduler, sequences: list[Sequence], new_tokens: int = 1) -> list[int]:
    """Run to the end, each sequence for `new_tokens`; the indices of the sequences as they were first admitted."""
    admitted: list[int] = []
    for _ in range(10_000):
        if not (one.waiting or one.running):
            return admitted
        plan = step(one)
        for part in plan.slices:
            index = sequences.index(part.sequence)
            if index not in admitted:
                admitted.append(index)
        for part in plan.slices:
            if part.sequence.n_new >= new_tokens:
                one.remove(part.sequence)
    raise AssertionError("no end")


def ask(engine: Engine, tokens: list[int], n: int = 12, **options: Any) -> Sequence:
    sequence = engine.prepare(GenerationRequest(tuple(tokens), greedy(n), **options))
    engine.add(sequence)
    return sequence


# --- order -----------------------------------------------------------------------------------------------------------


def test_higher_priority_is_served_first_and_equals_in_order_of_arrival() -> None:
    one = scheduler(max_batch_size=1)
    sequences = [request(distinct(n, 4), priority=priority) for n, priority in enumerate((0, 1, 0, 2, 1, -1))]
    for sequence in sequences:
        one.add(sequence)
    assert order_of_admission(one, sequences) == [3, 1, 4, 0, 2, 5]


def test_an_urgent_request_takes_the_place_of_the_youngest_of_the_lowest_priority() -> None:
    one = scheduler(max_batch_size=3)
    old, low, young = (request(distinct(n, 4), priority=p) for n, p in ((1, 1), (2, 0), (3, 0)))
    for sequence in (old, low, young):
        one.add(sequence)
    step(one)
    urgent = request(distinct(4, 4), priority=5)
    one.add(urgent)
    plan = step(one)
    assert urgent.state is State.RUNNING
    assert [sequence.state for sequence in (old, low, young)] == [State.RUNNING, State.RUNNING, State.WAITING]
    assert all(part.sequence is not young for part in plan.slices)
    one.remove(urgent)
    step(one)
    assert young.state is State.RUNNING
    assert young.n_pending == 1  # its pages were still there: only the token that has no successor yet is left


def test_an_urgent_request_takes_the_pages_of_lower_ones_when_the_cache_is_full() -> None:
    one = scheduler(n_pages=10)
    low = request(distinct(1, 30))
    one.add(low)
    step(one)
    step(one)
    urgent = request(distinct(2, 20), priority=1)
    one.add(urgent)
    step(one)
    assert (urgent.state, low.state) == (State.RUNNING, State.WAITING)


def test_the_prompt_of_an_urgent_request_is_computed_before_the_rest_of_a_running_one() -> None:
    one = scheduler(max_batch_size=4, max_batched_tokens=20)
    one.add(request(distinct(1, 80)))
    step(one)
    one.add(request(distinct(2, 30), priority=1))
    assert [lengths(step(one)) for _ in range(2)] == [[(1, 20)], [(1, 10), (0, 10)]]


def test_equals_do_not_take_each_others_place() -> None:
    one = scheduler(max_batch_size=1)
    first, second = request(distinct(1, 4), priority=3), request(distinct(2, 4), priority=3)
    one.add(first)
    step(one)
    one.add(second)
    step(one)
    assert (first.state, second.state) == (State.RUNNING, State.WAITING)


def test_a_preempted_request_gives_the_same_tokens() -> None:
    engine = toy_engine(max_batch_size=2)
    low = [ask(engine, prompt(n, 20), 20) for n in (1, 2)]
    for _ in range(5):
        engine.step()
    pieces = {one: list(one.token_ids[20:]) for one in low}
    urgent = [ask(engine, prompt(n, 20), 20, priority=1) for n in (3, 4)]
    outcomes = run(engine, *low, *urgent)
    assert engine.report().preemptions == 2
    for n, sequence in enumerate((*low, *urgent), start=1):
        assert sequence.token_ids[20:] == expected_tokens(prompt(n, 20), 20)
        assert sequence.token_ids[20:][: len(pieces.get(sequence, []))] == pieces.get(sequence, [])
    assert all(outcome.error is None for outcome in outcomes)


def test_one_who_computes_the_prefix_of_an_urgent_request_becomes_as_urgent() -> None:
    one = scheduler(max_batch_size=4, max_batched_tokens=20)
    low = request(distinct(1, 80))
    one.add(low)
    step(one)
    urgent = request([*distinct(1, 80), 5], priority=9)
    other = request(distinct(2, 80), priority=4)
    one.add(other)
    one.add(urgent)
    assert step(one).slices[0].sequence is low
    assert low.priority == 9


# --- nobody waits for ever -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_overtakes", [1, 3, 8])
def test_however_many_urgent_ones_come_the_longest_waiting_is_started_now_and_then(max_overtakes: int) -> None:
    one = scheduler(max_batch_size=1, max_overtakes=max_overtakes)
    low = [request(distinct(n, 4)) for n in range(5)]
    for sequence in low:
        one.add(sequence)
    n_urgent, n_before = 0, []
    done: set[Sequence] = set()
    while len(done) < 5:
        while sum(sequence.priority for sequence in one.waiting if sequence not in low) < 2:
            one.add(request(distinct(100 + n_urgent, 4), priority=1))
            n_urgent += 1
        for part in step(one).slices:
            one.remove(part.sequence)
            if part.sequence in low:
                done.add(part.sequence)
                n_before.append(n_urgent)
    gaps = [after - before for before, after in zip([0, *n_before], n_before, strict=False)]
    assert max(gaps) <= max_overtakes + 2  # those urgent ones that had arrived before it was raised, too
    assert [low.index(sequence) for sequence in sorted(done, key=lambda one: one.arrival)] == list(range(5))


def test_priority_is_strict_where_that_is_asked_for() -> None:
    one = scheduler(max_batch_size=1, max_overtakes=0)
    low = request(distinct(0, 4))
    one.add(low)
    for n in range(1, 60):
        one.add(request(distinct(n, 4), priority=1))
        for part in step(one).slices:
            one.remove(part.sequence)
    assert low.state is State.WAITING


def test_five_hundred_queued_requests_all_finish_in_order_of_arrival_within_a_priority() -> None:
    one = scheduler(max_batch_size=4, max_batched_tokens=20, n_pages=40, max_overtakes=0)
    sequences = [request(distinct(n, 2 + n % 17), priority=n % 3) for n in range(500)]
    for sequence in sequences:
        one.add(sequence)
    order = order_of_admission(one, sequences, new_tokens=3)
    assert len(order) == 500
    for priority in range(3):
        same = [index for index in order if sequences[index].priority == priority]
        assert same == sorted(same)
    assert [sequences[index].priority for index in order] == [2] * 166 + [1] * 167 + [0] * 167
    assert one.table.n_available == 40
    check_integrity(one.table)


def test_under_five_hundred_requests_of_one_priority_nobody_overtakes_by_more_than_the_batch() -> None:
    engine = toy_engine(ToyModel(), n_pages=128)
    sequences = [ask(engine, prompt(n % 90, 1 + n % 13), 2 + n % 3) for n in range(500)]
    finished: list[int] = []
    while engine.has_work:
        finished += [update.sequence.arrival for update in engine.step() if update.is_last]
    assert sorted(finished) == list(range(500))
    assert max(abs(place - arrival) for place, arrival in enumerate(finished)) <= 2 * engine.config.max_batch_size
    for n, sequence in enumerate(sequences):
        assert sequence.token_ids[1 + n % 13 :] == expected_tokens(prompt(n % 90, 1 + n % 13), 2 + n % 3)


# --- the queue's limit -----------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_the_next_and_says_the_limits() -> None:
    engine = toy_engine(max_batch_size=2, max_waiting=3)
    sequences = [ask(engine, prompt(n, 5)) for n in range(5)]
    with pytest.raises(QueueFullError, match=r"has 5 requests and takes 5 \(max_batch_size 2 and max_waiting 3\)"):
        ask(engine, prompt(9, 5))
    run(engine, *sequences)
    assert ask(engine, prompt(9, 5)).state is State.WAITING


def test_a_request_for_several_takes_as_many_places() -> None:
    engine = toy_engine(max_batch_size=2, max_waiting=1)
    four = engine.prepare(GenerationRequest(tuple(prompt(1, 5)), SamplingParams(n=4)))
    with pytest.raises(QueueFullError, match="leaves no room for 4 more"):
        engine.add(four)
    three = engine.prepare(GenerationRequest(tuple(prompt(1, 5)), SamplingParams(n=3, max_tokens=5)))
    engine.add(three)
    with pytest.raises(QueueFullError):
        ask(engine, prompt(2, 5))
    assert isinstance(QueueFullError("x"), EngineError)


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_a_request_whose_time_is_over_fails_alone_and_frees_its_pages() -> None:
    engine = toy_engine()
    doomed, other = ask(engine, prompt(1, 20), 200, timeout_s=1000), ask(engine, prompt(2, 20))
    engine.step()
    engine.step()
    assert doomed.deadline is not None
    doomed.deadline = time.perf_counter()
    held = len(doomed.held.pages) if doomed.held is not None else 0
    before = engine.report().running_pages
    updates = engine.step()
    error = next(update.error for update in updates if update.sequence is doomed)
    assert isinstance(error, RequestTimeoutError)
    assert isinstance(error, TimeoutError)
    assert "timeout_s of 1000 s: it had 2 of at most 200 new tokens" in str(error)
    assert doomed.state is State.ENDED
    assert engine.report().running_pages <= before - held + 1
    assert run(engine, other)[0].error is None
    assert other.token_ids[20:] == expected_tokens(prompt(2, 20), 12)


def test_a_waiting_request_and_a_half_computed_prompt_time_out_too() -> None:
    engine = toy_engine(max_batch_size=1)
    long, waiting = ask(engine, prompt(1, 100), timeout_s=5), ask(engine, prompt(2, 20), timeout_s=7)
    engine.step()
    long.deadline = waiting.deadline = 0.0
    errors = {update.sequence: str(update.error) for update in engine.step()}
    assert "32 of 100 prompt tokens were computed" in errors[long]
    assert "still waiting" in errors[waiting]
    assert not engine.has_work


def test_the_clock_of_a_request_runs_from_its_making() -> None:
    engine = toy_engine()
    sequence = engine.prepare(GenerationRequest((1, 2), greedy(5), timeout_s=0.01))
    time.sleep(0.02)
    engine.add(sequence)
    assert isinstance(run(engine, sequence)[0].error, RequestTimeoutError)


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf])
def test_a_timeout_that_makes_no_sense_is_refused(timeout_s: float) -> None:
    with pytest.raises(RequestError, match="timeout_s must be above 0"):
        GenerationRequest((1,), timeout_s=timeout_s)


def test_a_priority_must_be_a_whole_number() -> None:
    with pytest.raises(RequestError, match="priority must be a whole number"):
        GenerationRequest((1,), priority="high")  # type: ignore[arg-type]


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_cancelling_gives_back_exactly_the_pages_of_its_own_at_once() -> None:
    engine = toy_engine()
    shared = prompt(5, 40)
    one = ask(engine, [*shared, 1, 2, 3], 50)
    while not one.is_decoding:
        engine.step()
    two = ask(engine, [*shared, 7, 8], 50)
    while not two.is_decoding:
        engine.step()
    report = engine.report()
    assert two.held is not None
    own = len(two.held.pages) - 10
    engine.abort(two)
    assert engine.report().running_pages == report.running_pages - own
    engine.abort(one)
    after = engine.report()
    assert after.running_pages == 0
    assert after.free_pages + after.cached_pages == after.pages

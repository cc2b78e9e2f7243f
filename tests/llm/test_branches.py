"""Several continuations of one prompt: `SamplingParams.n`."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from exl2_rag.errors import ConstraintError, EngineError, RequestError, RequestTimeoutError
from exl2_rag.llm.engine import Engine, Update
from exl2_rag.llm.engine_thread import EngineThread
from exl2_rag.llm.page_table import PageTable
from exl2_rag.llm.page_table_check import check_integrity
from exl2_rag.llm.request import GenerationRequest, SamplingParams, branch_seed
from exl2_rag.llm.sequence import Sequence, State
from tests.llm.test_engine import OneOf, ask, prompt, run
from tests.support.toy_model import ToyModel, expected_tokens, toy_engine


def several(n: int, **options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "temperature": 1.2, "seed": 7, "ignore_eos": True, "n": n, **options})


def prepare(engine: Engine, tokens: list[int], sampling: SamplingParams) -> Sequence:
    return engine.prepare(GenerationRequest(tuple(tokens), sampling))


def run_branches(engine: Engine, *sequences: Sequence) -> list[list[list[int]]]:
    """The tokens of each branch of each sequence."""
    flat = [one for sequence in sequences for one in (sequence, *sequence.branches)]
    outcomes = run(engine, *flat)
    assert all(outcome.error is None for outcome in outcomes)
    tokens = iter([outcome.token_ids for outcome in outcomes])
    return [[next(tokens) for _ in range(1 + len(sequence.branches))] for sequence in sequences]


def alone(tokens: list[int], seed: int, **options: Any) -> list[int]:
    engine = toy_engine()
    return run(engine, ask(engine, tokens, several(1, seed=seed, **options)))[0].token_ids


def test_each_branch_draws_what_a_request_with_its_seed_draws() -> None:
    engine = toy_engine()
    found = run_branches(engine, ask(engine, prompt(3, 50), several(4)))[0]
    assert found == [alone(prompt(3, 50), branch_seed(7, index)) for index in range(4)]
    assert branch_seed(7, 0) == 7
    assert len({tuple(one) for one in found}) == 4


def test_the_prompt_is_computed_once_and_its_full_pages_are_held_once() -> None:
    model = ToyModel()
    engine = toy_engine(model, n_pages=128)
    sequence = ask(engine, prompt(3, 50), several(6))
    engine.step()
    engine.step()
    assert sequence.has_forked
    # 12 full pages of 4 and, for each, a copy of the half-filled one.
    assert engine.report().running_pages == 12 + 6
    run_branches(engine, sequence)
    assert model.n_computed == 50 + 6 * 11
    assert engine.report().running_pages == 0
    assert engine.report().prompt_tokens == 50


@pytest.mark.parametrize("length", [47, 48, 49])
def test_a_fork_at_any_place_of_a_page_gives_the_same_tokens(length: int) -> None:
    engine = toy_engine()
    found = run_branches(engine, ask(engine, prompt(3, length), several(3)))[0]
    assert found == [alone(prompt(3, length), branch_seed(7, index)) for index in range(3)]


def test_branches_that_find_no_place_in_the_batch_wait_and_give_the_same_tokens() -> None:
    engine = toy_engine(max_batch_size=2)
    found = run_branches(engine, ask(engine, prompt(3, 50), several(5)))[0]
    assert found == [alone(prompt(3, 50), branch_seed(7, index)) for index in range(5)]


def test_branches_in_a_tiny_cache_are_preempted_and_give_the_same_tokens() -> None:
    engine = toy_engine(n_pages=14, max_seq_len=50)
    asked = [ask(engine, prompt(first, 20), several(4, max_tokens=25)) for first in (1, 2)]
    found = run_branches(engine, *asked)
    assert engine.report().preemptions > 0
    for first, branches in zip((1, 2), found, strict=True):
        assert branches == [alone(prompt(first, 20), branch_seed(7, index), max_tokens=25) for index in range(4)]


def test_greedy_branches_are_all_the_same() -> None:
    engine = toy_engine()
    found = run_branches(engine, ask(engine, prompt(3, 20), several(3, temperature=0)))[0]
    assert found == [expected_tokens(prompt(3, 20), 12)] * 3


def test_every_branch_obeys_the_constraint() -> None:
    engine = toy_engine()
    options = [[5, 6, first, second] for first in range(10, 20) for second in range(30, 40)]
    found = run_branches(engine, ask(engine, prompt(3, 20), several(4), OneOf(*options)))[0]
    assert all(one in options for one in found)
    assert len({tuple(one) for one in found}) > 1


def test_a_branch_whose_constraint_gives_up_ends_alone() -> None:
    engine = toy_engine()
    sequence = ask(engine, prompt(3, 20), several(2), OneOf([5, 6], [5, 7], [6, 8], [6, 9]))
    sequence.branches[0].matcher.fail_at = 1  # type: ignore[union-attr]
    fine, failed = run(engine, sequence, *sequence.branches)
    assert isinstance(failed.error, ConstraintError)
    assert fine.token_ids in ([5, 6], [5, 7], [6, 8], [6, 9])


def test_aborting_before_the_fork_ends_all_branches() -> None:
    engine = toy_engine()
    sequence = ask(engine, prompt(3, 100), several(3))
    engine.step()
    engine.abort(sequence)
    assert not engine.has_work
    assert all(one.state is State.ENDED for one in (sequence, *sequence.branches))
    assert engine.report().running_pages == 0


def test_a_branch_aborted_before_the_fork_never_runs() -> None:
    engine = toy_engine()
    sequence = ask(engine, prompt(3, 100), several(3))
    engine.step()
    engine.abort(sequence.branches[1])
    outcomes = run(engine, sequence, *sequence.branches)
    assert [len(outcome.token_ids) for outcome in outcomes] == [12, 12, 0]


def test_n_below_one_is_refused() -> None:
    with pytest.raises(RequestError, match="n must be a whole number of at least 1, got 0"):
        SamplingParams(n=0)


def test_a_forked_page_is_a_copy_and_the_books_agree() -> None:
    table = PageTable(8, 4)
    held = table.hold([], 0)
    table.extend(held, 10)
    table.commit(held, list(range(10)))
    branch = table.fork(held)
    check_integrity(table)
    assert branch.pages[:2] == held.pages[:2]
    assert branch.pages[2] != held.pages[2]
    assert branch.copy is not None
    assert (branch.copy.source, branch.copy.target, branch.copy.n_rows) == (held.pages[2], branch.pages[2], 2)
    table.extend(branch, 12)
    table.commit(branch, [50, 51])
    table.extend(held, 12)
    table.commit(held, [50, 51])  # the same after all: one page is given back
    check_integrity(table)
    assert held.pages == branch.pages


def test_a_fork_without_a_page_to_copy_to_shares_the_full_ones() -> None:
    table = PageTable(3, 4)
    held = table.hold([], 0)
    table.extend(held, 10)
    table.commit(held, list(range(10)))
    branch = table.fork(held)
    check_integrity(table)
    assert branch.copy is None
    assert branch.n_tokens == 8


# --- through the engine's thread -------------------------------------------------------------------------------------


def test_a_stream_of_several_carries_the_index_and_ends_with_the_last() -> None:
    engine = toy_engine()
    thread = EngineThread(engine)
    sequence = prepare(engine, prompt(3, 20), several(3))
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    n_last = 0
    for piece in thread.stream(sequence):
        tokens[piece.index] += piece.token_ids
        n_last += piece.finish_reason is not None
    assert n_last == 3
    assert [tokens[index] for index in range(3)] == [alone(prompt(3, 20), branch_seed(7, index)) for index in range(3)]
    assert thread.active_requests == 0
    thread.close()


def test_a_request_for_several_counts_as_one_and_is_cancelled_as_one() -> None:
    engine = toy_engine()
    thread = EngineThread(engine)
    stream = thread.stream(prepare(engine, prompt(3, 20), several(3, max_tokens=200)))
    next(stream)
    assert thread.active_requests == 1
    stream.close()
    assert thread.active_requests == 0
    assert thread.call(lambda: engine.has_work) is False
    thread.close()


def test_an_error_of_one_branch_is_the_error_of_the_request() -> None:
    engine = toy_engine()
    thread = EngineThread(engine)
    updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
    sequence = prepare(engine, prompt(3, 20), several(3, max_tokens=200))
    sequence.branches[1].deadline, sequence.branches[1].timeout_s = 0.0, 1.0
    ticket = thread.submit(sequence, updates.put)
    while (update := updates.get(timeout=60)).error is None:
        pass
    assert isinstance(update.error, RequestTimeoutError)
    assert isinstance(update.error, EngineError)
    assert ticket.has_ended
    assert thread.call(lambda: engine.has_work) is False
    assert updates.empty()
    thread.close()

from __future__ import annotations

import pytest

from exl2_rag.llm.speculation.acceptance import Acceptance
from exl2_rag.llm.speculation.draft_lengths import StepCosts, choose_lengths

SURE = [1.0] * 15


def cliff(n_rows: int) -> float:
    """Rows are cheap up to four, and cost a step each beyond."""
    return 1 + 0.3 * (min(n_rows, 4) - 1) + max(0, n_rows - 4)


def test_drafts_stop_where_rows_become_dear() -> None:
    assert choose_lengths([SURE], 1, cliff) == [3]


def test_where_rows_are_free_everything_likely_is_drafted() -> None:
    assert choose_lengths([[0.9, 0.5, 0.2]], 1, lambda _: 1.0) == [3]


@pytest.mark.parametrize("chances", [[], [0.1], [0.29, 0.1]])
def test_nothing_is_drafted_that_does_not_pay(chances: list[float]) -> None:
    assert choose_lengths([chances], 1, cliff) == [0]


def test_a_cheap_row_behind_a_dear_one_is_still_found() -> None:
    costs = {1: 1.0, 2: 2.0, 3: 2.0, 4: 2.0}
    assert choose_lengths([[1.0, 1.0, 1.0]], 1, costs.__getitem__) == [3]


def test_the_likeliest_tokens_of_all_sequences_come_first() -> None:
    assert choose_lengths([[0.5, 0.2], [0.95, 0.9], []], 3, lambda rows: 1 + 0.12 * rows) == [1, 2, 0]


def test_what_making_a_draft_takes_counts_too() -> None:
    assert choose_lengths([SURE[:4]], 1, lambda _: 1.0, lambda length: 0.1 * length) == [4]
    assert choose_lengths([SURE[:4]], 1, lambda _: 1.0, lambda length: 1.5 * length) == [0]


def test_costs_are_medians_without_the_first_step_of_a_size() -> None:
    costs = StepCosts()
    assert not costs.knows_below(3)
    for seconds in (9.0, 1.0, 1.2, 7.0):
        costs.note(2, seconds)
    assert costs.seconds(2) == 1.2
    assert costs.knows_below(3)
    assert not costs.knows_below(1)


def test_a_size_that_was_never_tried_is_taken_to_be_cheap_but_no_dearer_than_a_larger_one() -> None:
    costs = StepCosts()
    for rows, seconds in ((1, 1.0), (6, 1.1)):
        costs.note(rows, 0.0)
        costs.note(rows, seconds)
    assert costs.seconds(2) == pytest.approx(1.05)
    assert costs.seconds(5) == pytest.approx(1.1)
    assert costs.seconds(8) == pytest.approx(1.1 * 1.1)


def test_a_rate_follows_what_happens_and_a_new_request_starts_from_all_before_it() -> None:
    shared = Acceptance(2)
    first = Acceptance(2, shared)
    for _ in range(200):
        first.note(0, hit=True)
    assert first.chance(0) > 0.97
    assert first.chance(1) == 0.5
    second = Acceptance(2, shared)
    assert second.chance(0) > 0.9
    for _ in range(20):
        second.note(0, hit=False)
    assert second.chance(0) < 0.2

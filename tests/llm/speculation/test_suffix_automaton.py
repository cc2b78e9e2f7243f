from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from exl2_rag.llm.speculation.suffix_automaton import SuffixAutomaton


def longest_recurrence(token_ids: list[int]) -> int:
    """Length of the longest ending that occurs before, by trying all."""
    text = token_ids
    for length in range(len(text) - 1, 0, -1):
        ending = text[len(text) - length :]
        if any(text[start : start + length] == ending for start in range(len(text) - length)):
            return length
    return 0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40))
def test_the_longest_ending_that_occurred_before_is_found_after_every_token(token_ids: list[int]) -> None:
    automaton = SuffixAutomaton()
    for n, token_id in enumerate(token_ids, start=1):
        automaton.extend(token_id)
        length, end = automaton.n_recurring, automaton.recurred_at
        assert length == longest_recurrence(token_ids[:n])
        if length:
            assert end < n
            assert token_ids[end - length : end] == token_ids[n - length : n]


def test_the_continuation_is_what_came_after_the_earlier_occurrence() -> None:
    automaton = SuffixAutomaton([1, 2, 3, 4, 5, 9, 1, 2, 3])
    assert automaton.n_recurring == 3
    assert automaton.continuation(4) == [4, 5, 9, 1]
    assert automaton.continuation(0) == []


def test_a_text_that_repeats_itself_goes_on_in_a_circle() -> None:
    assert SuffixAutomaton([7, 1, 2, 1, 2]).continuation(5) == [1, 2, 1, 2, 1]
    assert SuffixAutomaton([4, 4]).continuation(3) == [4, 4, 4]


def test_of_two_occurrences_the_nearer_one_is_followed_once_it_was_met() -> None:
    automaton = SuffixAutomaton([1, 2, 7, 0, 1, 2, 8, 0])
    for token_id in (1, 2):
        automaton.extend(token_id)
    assert automaton.continuation(1) == [8]


def test_nothing_recurs_in_a_text_of_different_tokens() -> None:
    automaton = SuffixAutomaton(range(50))
    assert automaton.n_recurring == 0
    assert automaton.continuation(3) == []
    assert SuffixAutomaton().continuation(3) == []


def test_the_automaton_stays_within_two_states_a_token() -> None:
    automaton = SuffixAutomaton(n * n % 7 for n in range(3000))
    assert len(automaton._next) <= 2 * 3000

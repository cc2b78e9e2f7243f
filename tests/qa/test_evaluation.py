"""Scores agree with SQuAD's definitions; the baselines do what their names say."""

from __future__ import annotations

import pytest

from exl2_rag.qa.evaluation import (
    Abstention,
    abstention,
    best_overlap_sentence,
    contains_answer,
    exact_match,
    f1_score,
    normalise_answer,
    sentences,
)

PASSAGE = (
    "The Panthers beat the Cardinals. Super Bowl 50 was played in Santa Clara, California. "
    "It was the fiftieth game; the players wore gold."
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Denver Broncos", "denver broncos"),
        ("Levi's Stadium,", "levis stadium"),
        ("  an   apple a day ", "apple day"),
        ("Theory", "theory"),
        ("the", ""),
    ],
)
def test_normal_form_is_squads(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


def test_exact_match_takes_any_gold_answer() -> None:
    assert exact_match("the Denver Broncos.", ["Broncos", "Denver Broncos"])
    assert not exact_match("Denver", ["Broncos", "Denver Broncos"])


def test_f1_is_the_best_word_overlap() -> None:
    assert f1_score("in Santa Clara", ["Santa Clara", "Levi's Stadium"]) == pytest.approx(0.8)
    assert f1_score("gold gold", ["gold"]) == pytest.approx(2 / 3)
    assert f1_score("x", ["y"]) == 0


def test_an_unanswerable_question_is_answered_rightly_by_nothing() -> None:
    assert exact_match("", [])
    assert f1_score("", []) == 1
    assert not exact_match("Broncos", [])
    assert f1_score("Broncos", []) == 0


def test_an_answer_is_contained_as_whole_words() -> None:
    assert contains_answer("It was played in Santa Clara, California.", ["Santa Clara"])
    assert not contains_answer("The cartwheel", ["art"])
    assert not contains_answer("Anything", ["the"])


def test_abstention_counts_who_declined_rightly() -> None:
    counts = abstention([(True, True), (True, False), (False, False), (False, True), (False, False)])
    assert counts == Abstention(declined=3, unanswerable=3, rightly_declined=2)
    assert counts.precision == pytest.approx(2 / 3)
    assert counts.recall == pytest.approx(2 / 3)


def test_a_ratio_without_cases_is_not_a_number() -> None:
    assert abstention([(True, True)]).precision is None
    assert abstention([(True, True)]).recall is None


def test_best_overlap_reads_stems_and_skips_stop_words() -> None:
    assert best_overlap_sentence("Where was the Super Bowl playing?", PASSAGE).startswith("Super Bowl 50")
    assert best_overlap_sentence("Who did the Panthers beat?", PASSAGE) == "The Panthers beat the Cardinals."


def test_sentences_are_verbatim() -> None:
    assert sentences(PASSAGE) == [
        "The Panthers beat the Cardinals.",
        "Super Bowl 50 was played in Santa Clara, California.",
        "It was the fiftieth game; the players wore gold.",
    ]

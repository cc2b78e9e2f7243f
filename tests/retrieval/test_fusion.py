"""Fusing two rankings, against numbers worked out by hand."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2_rag.retrieval.fusion import fuse_ranks, fuse_scores

DENSE = [("a", 0.9), ("b", 0.5), ("c", 0.1)]
LEXICAL = [("b", 12.0), ("d", 6.0), ("a", 2.0)]


def test_scores_are_normalised_and_weighted() -> None:
    assert fuse_scores(DENSE, LEXICAL) == [
        ("b", pytest.approx(0.5 * 5 / 9 + 0.5 * 1)),
        ("a", pytest.approx(0.5 * 1 + 0.5 * 2 / 12)),
        ("d", pytest.approx(0.5 * 6 / 12)),
        ("c", pytest.approx(0.5 * 1 / 9)),
    ]


def test_the_result_does_not_depend_on_how_many_candidates_there_are() -> None:
    fewer = dict(fuse_scores(DENSE[:2], LEXICAL[:2]))
    more = dict(fuse_scores(DENSE, LEXICAL[:2]))
    assert fewer == {identifier: more[identifier] for identifier in fewer}


def test_a_score_below_zero_counts_as_zero() -> None:
    assert fuse_scores([("a", -0.2), ("b", -0.1)], [("b", 1.0)]) == [("b", 0.5), ("a", 0.0)]
    assert fuse_scores([("a", 0.5), ("b", -0.25)], [("b", 1.0)]) == [("a", 0.5), ("b", 0.5)]


def test_a_weight_of_one_ranks_by_the_dense_score_alone() -> None:
    assert [identifier for identifier, _ in fuse_scores(DENSE, LEXICAL, dense_weight=1.0)][:2] == ["a", "b"]


def test_ranks_are_added_as_reciprocals() -> None:
    fused = dict(fuse_ranks(DENSE, LEXICAL))
    assert fused["b"] == pytest.approx(1 / 62 + 1 / 61)
    assert fused["d"] == pytest.approx(1 / 62)
    assert next(iter(fused)) == "b"


def test_a_single_candidate_and_none_at_all_are_fine() -> None:
    assert fuse_scores([("a", 0.3)], []) == [("a", 0.5)]
    assert fuse_scores([], []) == []
    assert fuse_ranks([], []) == []


rankings = st.dictionaries(st.text(max_size=3), st.floats(-10, 10), max_size=8).map(
    lambda scores: sorted(scores.items(), key=lambda item: -item[1])
)


@given(rankings, rankings, st.floats(0, 1))
def test_every_candidate_comes_back_once_and_scores_descend(dense: list, lexical: list, weight: float) -> None:
    for fused in (fuse_scores(dense, lexical, dense_weight=weight), fuse_ranks(dense, lexical)):
        assert {identifier for identifier, _ in fused} == {identifier for identifier, _ in [*dense, *lexical]}
        assert len(fused) == len({identifier for identifier, _ in fused})
        assert all(a >= b for (_, a), (_, b) in pairwise(fused))

from __future__ import annotations

import random

from exl2_rag.llm.prefix_groups import group_by_prefix


def test_sequences_with_the_same_beginning_become_neighbours():
    groups = group_by_prefix([[1, 2, 3], [7, 8], [1, 2, 4, 5], [7, 8, 9], [1, 2, 3, 6]], min_pages=2)
    assert groups.order == (0, 4, 2, 1, 3)
    assert groups.starts == (0, 3, 5)
    assert groups.prefix_pages == (2, 2)
    assert groups.shares


def test_short_prefixes_and_lone_sequences_share_nothing():
    groups = group_by_prefix([[1, 2], [1, 3], [5]], min_pages=2)
    assert groups.prefix_pages == (0, 0, 0)
    assert not groups.shares
    assert group_by_prefix([], min_pages=1).starts == (0,)
    assert group_by_prefix([[], []], min_pages=0).prefix_pages == (0, 0)


def test_a_neighbour_that_shares_little_does_not_spoil_a_long_prefix():
    deep = [[1, *range(10, 40), tail] for tail in (50, 51, 52)]
    groups = group_by_prefix([*deep, [1, 99]], min_pages=1)
    assert groups.prefix_pages == (31, 0)


def test_groups_of_random_batches_share_what_they_say():
    rng = random.Random(0)
    for _ in range(300):
        pages = [[rng.randint(0, 1) for _ in range(rng.randint(0, 6))] for _ in range(rng.randint(0, 9))]
        groups = group_by_prefix(pages, min_pages=rng.randint(0, 3))
        assert sorted(groups.order) == list(range(len(pages)))
        assert groups.starts[0] == 0
        assert groups.starts[-1] == len(pages)
        for first, last, shared in zip(groups.starts, groups.starts[1:], groups.prefix_pages, strict=False):
            members = [pages[index] for index in groups.order[first:last]]
            assert first < last
            assert all(one[:shared] == members[0][:shared] and len(one) >= shared for one in members)

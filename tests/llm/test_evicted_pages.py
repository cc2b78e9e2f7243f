from __future__ import annotations

import random

from exl2_rag.llm.evicted_pages import EvictedPages


def test_a_page_is_found_by_its_key_and_by_its_tokens() -> None:
    pages = EvictedPages(10)
    pages.add(b"root", [1, 2, 3], b"key")
    pages.add(b"key", [4], None)
    assert pages.has(b"key")
    assert not pages.has(b"root")
    assert pages.longest_match(b"root", [1, 2, 9]) == 2
    assert pages.longest_match(b"root", [1, 2, 3, 4]) == 3
    assert pages.longest_match(b"root", [2, 2, 3]) == 0
    assert pages.longest_match(b"key", [4, 4]) == 1
    assert pages.longest_match(b"key", []) == 0


def test_the_oldest_is_forgotten_first_and_nothing_is_left_of_it() -> None:
    rng = random.Random(1)
    pages = EvictedPages(20)
    expected: list[tuple[bytes, list[int], bytes | None]] = []
    for _ in range(2000):
        key = rng.choice([None, bytes([rng.randrange(8)])])
        page = (bytes([rng.randrange(3)]), [rng.randrange(2) for _ in range(4)], key)
        pages.add(*page)
        expected = [*expected, page][-20:]
        assert len(pages) == len(expected)
        for number in range(8):
            assert pages.has(bytes([number])) == any(one[2] == bytes([number]) for one in expected)
        wanted = [rng.randrange(2) for _ in range(4)]
        for parent in (b"\0", b"\1", b"\2"):
            matches = [
                next((place for place in range(4) if tokens[place] != wanted[place]), 4)
                for where, tokens, _ in expected
                if where == parent
            ]
            assert pages.longest_match(parent, wanted) == max(matches, default=0)


def test_no_capacity_remembers_nothing() -> None:
    pages = EvictedPages(0)
    pages.add(b"root", [1], b"key")
    assert len(pages) == 0
    assert not pages.has(b"key")

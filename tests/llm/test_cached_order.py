from __future__ import annotations

import itertools
import random

import pytest

from exl2_rag.llm.cached_order import cached_order
from exl2_rag.llm.page_table import PageTable
from tests.support.page_memory import PageMemory

TENANT = b"tenant".ljust(32)


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.fixture
def memory() -> PageMemory:
    return PageMemory(PageTable(n_pages=200, page_size=4))


def keep(memory: PageMemory, *parts: str, root: bytes | None = None) -> None:
    tokens = ids("".join(parts))
    held = memory.hold(tokens, limit=len(tokens), root=root)
    assert memory.compute(held, tokens) == len(tokens)
    memory.release(held)


def order(memory: PageMemory, prefix: str, blocks: str, root: bytes | None = None) -> str:
    """The order of blocks "a" to "e" as letters."""
    letters = blocks
    found = cached_order(memory.table, ids(prefix), [ids(BLOCKS[letter]) for letter in letters], root=root)
    assert sorted(found) == list(range(len(letters)))
    return "".join(letters[place] for place in found)


BLOCKS = {"a": "apples are red; ", "b": "bees. ", "c": "cats sleep all day, ", "d": "dogs bark. ", "e": "eels "}


def chain(letters: str) -> str:
    return "".join(BLOCKS[letter] for letter in letters)


def test_an_empty_cache_leaves_the_order_as_it_is(memory: PageMemory) -> None:
    assert order(memory, "system: ", "cab") == "cab"
    keep(memory, "another prefix ", chain("abc"))
    assert order(memory, "system: ", "cab") == "cab"


@pytest.mark.parametrize("prefix", ["", "s", "sys:", "system: ", "system rules: "])
def test_blocks_follow_the_cached_path_wherever_pages_end(memory: PageMemory, prefix: str) -> None:
    keep(memory, prefix, chain("dbac"), "question?")
    assert order(memory, prefix, "abcd") == "dbac"
    assert order(memory, prefix, "abc") == "abc"  # nothing on the path begins with d missing
    assert order(memory, prefix, "abd") == "dba"
    assert order(memory, prefix, "eabd") == "dbae"


def test_the_deepest_of_several_paths_wins(memory: PageMemory) -> None:
    keep(memory, "system: ", chain("ab"), "one?")
    keep(memory, "system: ", chain("bca"), "two?")
    assert order(memory, "system: ", "abc") == "bca"
    assert order(memory, "system: ", "ab") == "ab"
    keep(memory, "system: ", chain("acbd"), "three?")
    assert order(memory, "system: ", "abcd") == "acbd"


def test_a_block_that_is_cached_in_part_comes_next(memory: PageMemory) -> None:
    keep(memory, "system: ", chain("b"), BLOCKS["c"][:12])
    assert order(memory, "system: ", "abc") == "bca"
    memory.table.drop()
    keep(memory, "system: ", chain("b"), BLOCKS["c"][:3])  # less than a page is not worth another order
    assert order(memory, "system: ", "abc") == "bac"


def test_equal_depth_goes_to_the_preferred_order(memory: PageMemory) -> None:
    keep(memory, "system: ", chain("ab"))
    keep(memory, "system: ", chain("ba"))
    assert order(memory, "system: ", "ab") == "ab"
    assert order(memory, "system: ", "ba") == "ba"


def test_the_first_block_may_have_tokens_of_its_own(memory: PageMemory) -> None:
    keep(memory, "system: ", " " + chain("ba"))
    blocks = [ids(BLOCKS[letter]) for letter in "ab"]
    first = [ids(" " + BLOCKS[letter]) for letter in "ab"]
    assert cached_order(memory.table, ids("system: "), blocks, first=first) == [1, 0]
    assert cached_order(memory.table, ids("system: "), blocks) == [0, 1]


def test_paths_of_another_root_do_not_count(memory: PageMemory) -> None:
    keep(memory, "system: ", chain("ba"), root=TENANT)
    assert order(memory, "system: ", "ab") == "ab"
    assert order(memory, "system: ", "ab", root=TENANT) == "ba"


def test_empty_and_equal_blocks_are_kept(memory: PageMemory) -> None:
    keep(memory, "system: ", chain("bb"))
    blocks = [[], ids(BLOCKS["a"]), ids(BLOCKS["b"]), ids(BLOCKS["b"])]
    assert cached_order(memory.table, ids("system: "), blocks) == [2, 3, 0, 1]
    assert cached_order(memory.table, ids("system: "), []) == []


def test_the_search_is_bounded_and_returns_the_best_so_far(memory: PageMemory) -> None:
    keep(memory, "system: ", chain("abcd"))
    blocks = [ids(BLOCKS[letter]) for letter in "dcba"]
    full = cached_order(memory.table, ids("system: "), blocks)
    assert full == [3, 2, 1, 0]
    assert cached_order(memory.table, ids("system: "), blocks, max_steps=4) == [3, 0, 1, 2]
    assert cached_order(memory.table, ids("system: "), blocks, max_steps=0) == [0, 1, 2, 3]


def test_it_changes_nothing(memory: PageMemory) -> None:
    keep(memory, "system: ", chain("abcd"))
    before = [(page.token_ids, page.last_used, page.n_holders) for page in memory.table.pages]
    order(memory, "system: ", "dcba")
    assert before == [(page.token_ids, page.last_used, page.n_holders) for page in memory.table.pages]
    memory.check()


def test_no_order_reuses_more_on_random_trees() -> None:
    rng = random.Random(3)
    for _ in range(40):
        memory = PageMemory(PageTable(n_pages=100, page_size=4))
        blocks = [[rng.randrange(3) for _ in range(rng.randrange(4, 9))] for _ in range(4)]
        prefix = [7] * rng.randrange(6)
        for _ in range(6):
            chosen = rng.sample(range(4), rng.randrange(1, 5))
            tokens = [*prefix, *itertools.chain(*(blocks[one] for one in chosen)), 9]
            held = memory.hold(tokens, limit=len(tokens))
            memory.compute(held, tokens)
            memory.release(held)

        def reused(order: tuple[int, ...] | list[int], memory: PageMemory = memory) -> int:
            tokens = [*prefix, *itertools.chain(*(blocks[one] for one in order))]  # noqa: B023
            return memory.table.lookup(tokens, len(tokens)).n_tokens

        best = max(reused(one) for one in itertools.permutations(range(4)))
        # A block of which less than a page is cached is not looked for.
        assert reused(cached_order(memory.table, prefix, blocks)) > best - 4

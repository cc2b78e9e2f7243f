from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import pytest

from exl2_rag.errors import CacheIntegrityError
from exl2_rag.llm import page_table
from exl2_rag.llm.page_table import HeldPages, PageTable, common_prefix
from exl2_rag.llm.page_table_check import check_integrity
from tests.support.page_memory import PageMemory
from tests.support.page_table_operations import PageTableOperations


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def fill(memory: PageMemory, text: str) -> HeldPages:
    """Hold `text` and compute whatever of it is not cached, as a sequence would."""
    held = memory.hold(ids(text), limit=len(text))
    assert memory.compute(held, ids(text)) == len(text)
    return held


def cached(memory: PageMemory, text: str) -> int:
    return memory.table.lookup(ids(text), limit=len(text)).n_tokens


@pytest.fixture
def memory() -> PageMemory:
    return PageMemory(PageTable(n_pages=8, page_size=4))


def test_a_new_table_holds_nothing_and_is_sound(memory: PageMemory) -> None:
    assert cached(memory, "the cat sat") == 0
    assert memory.table.n_available == 8
    memory.check()


def test_a_released_text_is_found_again_to_the_token(memory: PageMemory) -> None:
    memory.release(fill(memory, "the cat sat"))
    assert cached(memory, "the cat sat") == 11
    assert cached(memory, "the cat sat on the mat") == 11
    assert cached(memory, "the cat sang") == 10
    assert cached(memory, "the cow sat") == 5
    assert cached(memory, "a cat sat") == 0


def test_a_limit_keeps_the_last_token_to_be_computed(memory: PageMemory) -> None:
    memory.release(fill(memory, "the cat "))
    assert memory.table.lookup(ids("the cat "), limit=7).n_tokens == 7
    held = memory.hold(ids("the cat "), limit=7)
    assert held.n_tokens == 7
    assert held.copy is not None
    assert held.copy.n_rows == 3


def test_full_pages_are_shared_and_the_partly_matching_one_is_copied(memory: PageMemory) -> None:
    first = fill(memory, "the cat sat")
    second = fill(memory, "the cat sang")
    assert first.pages[:2] == second.pages[:2]
    assert first.pages[2] != second.pages[2]
    assert memory.table.counts().running == 4
    memory.check()


def test_rows_are_copied_from_a_page_that_another_sequence_is_still_filling(memory: PageMemory) -> None:
    fill(memory, "the cat sa")
    second = memory.hold(ids("the cat sang"), limit=12)
    assert second.n_tokens == 10
    memory.check()


def test_pages_become_shareable_while_a_sequence_decodes(memory: PageMemory) -> None:
    held = fill(memory, "the")
    for length in range(4, 13):
        memory.compute(held, ids("the cat sang")[:length])
        assert cached(memory, "the cat sang") == length
        memory.check()


def test_a_page_computed_twice_is_kept_once(memory: PageMemory) -> None:
    first = memory.hold(ids("the cat sat"), limit=0)
    second = memory.hold(ids("the cat sat"), limit=0)
    memory.compute(first, ids("the cat sat"))
    memory.compute(second, ids("the cat sat"))
    assert first.pages[:2] == second.pages[:2]
    assert memory.table.counts().running == 4
    memory.check()


def test_a_partly_filled_page_nobody_holds_is_continued_without_a_copy(memory: PageMemory) -> None:
    memory.release(fill(memory, "the cat sat"))
    held = memory.hold(ids("the cat sat on"), limit=14)
    assert held.copy is None
    assert held.n_tokens == 11
    memory.compute(held, ids("the cat sat on"))
    memory.check()


def test_the_only_page_left_is_taken_over_where_it_lies() -> None:
    memory = PageMemory(PageTable(n_pages=2, page_size=4))
    memory.release(fill(memory, "the cat "))
    held = fill(memory, "the cow")
    assert held.n_tokens == 7
    assert held.copy is None
    memory.check()


def test_partly_matching_rows_are_left_out_when_no_page_is_left_for_them() -> None:
    memory = PageMemory(PageTable(n_pages=2, page_size=4))
    fill(memory, "the cat ")
    held = memory.hold(ids("the cow"), limit=7)
    assert held.n_tokens == 4
    memory.check()


def test_extending_gives_as_many_tokens_as_there_are_pages_for(memory: PageMemory) -> None:
    held = memory.hold(ids("x"), limit=1)
    assert memory.table.extend(held, 30) == 30
    assert memory.table.extend(held, 40) == 32
    memory.release(held)
    assert memory.table.counts().free == 8
    memory.check()


def test_the_least_recently_used_chain_goes_first_and_its_tail_before_its_head() -> None:
    memory = PageMemory(PageTable(n_pages=6, page_size=4))
    memory.release(fill(memory, "aaaabbbbcccc"))
    memory.release(fill(memory, "ddddeeee"))
    fill(memory, "ffffgggg")  # one page is free, one must be evicted
    assert cached(memory, "aaaabbbbcccc") == 8
    assert cached(memory, "ddddeeee") == 8
    fill(memory, "hhhhiiii")
    assert cached(memory, "aaaabbbbcccc") == 0
    assert cached(memory, "ddddeeee") == 8
    memory.check()


def test_using_a_chain_again_makes_it_the_last_to_go() -> None:
    memory = PageMemory(PageTable(n_pages=5, page_size=4))
    memory.release(fill(memory, "aaaabbbb"))
    memory.release(fill(memory, "ddddeeee"))
    memory.release(fill(memory, "aaaabbbb"))
    fill(memory, "ffffgggg")
    assert cached(memory, "aaaabbbb") == 8
    assert cached(memory, "ddddeeee") == 4


def test_a_shared_head_outlives_both_tails() -> None:
    memory = PageMemory(PageTable(n_pages=4, page_size=4))
    memory.release(fill(memory, "aaaabbbb"))
    memory.release(fill(memory, "aaaacccc"))
    fill(memory, "xxxxyyyyzzzz")
    assert cached(memory, "aaaabbbb") == 4
    assert cached(memory, "aaaacccc") == 4
    memory.check()


def test_pinned_pages_are_never_evicted(memory: PageMemory) -> None:
    pinned = fill(memory, "the cat sat")
    pinned.pinned = True
    other = memory.hold(ids("x"), limit=1)
    assert memory.table.extend(other, 100) == 20
    assert cached(memory, "the cat sat") == 11
    assert memory.table.counts().pinned == 3
    memory.check()
    memory.release(pinned)
    assert memory.table.extend(other, 100) == 32
    assert cached(memory, "the cat sat") == 0


def test_sequences_of_different_roots_share_nothing() -> None:
    memory = PageMemory(PageTable(n_pages=20, page_size=4))
    text = ids("the cat sat")
    for root in (b"a" * 32, b"b" * 32, None):
        held = memory.hold(text, limit=11, root=root)
        assert held.n_tokens == 0
        memory.compute(held, text)
        memory.check()
    assert memory.table.counts().running == 9
    again = memory.hold(text, limit=11, root=b"a" * 32)
    assert again.n_tokens == 11
    memory.release(again)
    assert memory.table.lookup(text, 11, root=b"c" * 32).n_tokens == 0


def test_the_page_being_filled_is_cut_and_the_pages_after_the_cut_are_given_back(memory: PageMemory) -> None:
    held = fill(memory, "the cat sat")
    memory.table.extend(held, 20)
    memory.truncate(held, 10)
    assert held.n_tokens == 10
    assert len(held.pages) == 3
    assert cached(memory, "the cat sat") == 10
    assert memory.table.counts().free == 5
    memory.check()
    assert memory.compute(held, ids("the cat sang")) == 12
    memory.check_content(held, ids("the cat sang"))


def test_a_full_page_that_is_cut_into_stays_for_others_and_its_rows_are_copied(memory: PageMemory) -> None:
    first, second = fill(memory, "the cat sat on"), fill(memory, "the cat sat up")
    for held, text in ((first, "the coat"), (second, "the chat")):
        memory.truncate(held, 5)
        assert held.n_tokens == 5
        memory.check()
        memory.compute(held, ids(text))
        memory.check_content(held, ids(text))
    assert cached(memory, "the cat sat on") == 14
    assert cached(memory, "the cat sat up") == 14
    memory.check()


def test_a_cut_between_pages_copies_nothing(memory: PageMemory) -> None:
    held = fill(memory, "the cat sat")
    assert memory.table.truncate(held, 8) is None
    assert (held.n_tokens, len(held.pages), len(held.keys)) == (8, 2, 2)
    assert cached(memory, "the cat sat") == 11
    assert memory.table.truncate(held, 0) is None
    assert (held.n_tokens, held.pages, held.keys) == (0, [], [])
    memory.check()


def test_rows_of_a_cut_page_are_given_up_when_no_page_is_left_to_copy_them_to() -> None:
    memory = PageMemory(PageTable(n_pages=3, page_size=4))
    held, other = fill(memory, "the cat "), fill(memory, "the cat on")
    assert memory.table.n_available == 0
    memory.truncate(held, 6)
    assert held.n_tokens == 4
    memory.check()
    memory.check_content(other, ids("the cat on"))


@pytest.mark.parametrize("n_tokens", [-1, 12])
def test_more_tokens_than_there_are_cannot_be_kept(memory: PageMemory, n_tokens: int) -> None:
    held = fill(memory, "the cat sat")
    with pytest.raises(ValueError, match="from 0 to 11"):
        memory.table.truncate(held, n_tokens)


def test_token_ids_are_compared_on_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PageMemory(PageTable(n_pages=8, page_size=4))
    monkeypatch.setattr(memory.table, "page_key", lambda parent_key, token_ids: b"always the same")
    held = memory.hold(ids("abcd"), limit=4)
    memory.compute(held, ids("abcd"))
    assert cached(memory, "abcd") == 4
    assert cached(memory, "efgh") == 0


def test_known_keys_are_computed_once_and_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PageMemory(PageTable(n_pages=8, page_size=4))
    known: list[bytes] = []
    text = ids("the cat sat on the mat")
    assert memory.table.lookup(text, 22, known).n_tokens == 0
    memory.release(fill(memory, "the cat sat on"))
    for _ in range(2):
        assert memory.table.lookup(text, 22, known) == memory.table.lookup(text, 22)
        assert len(known) == 4
    monkeypatch.setattr(memory.table, "page_key", None)
    assert memory.table.lookup(text, 22, known).n_tokens == 14


def test_siblings_that_cannot_be_better_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PageMemory(PageTable(n_pages=600, page_size=4))
    for n in range(500):
        memory.release(memory_of(memory, [256, n, n + 1, n + 2]))
    compared: list[Seq[int]] = []

    def counted(left: Seq[int], right: Seq[int]) -> int:
        compared.append(left)
        return common_prefix(left, right)

    monkeypatch.setattr(page_table, "common_prefix", counted)
    for n in range(100, 200):
        compared.clear()
        assert memory.table.lookup([256, n, n + 1, 5], 4).n_tokens == 3
        assert len(compared) <= 3


def memory_of(memory: PageMemory, token_ids: list[int]) -> HeldPages:
    held = memory.hold(token_ids, limit=len(token_ids))
    memory.compute(held, token_ids)
    return held


def test_common_prefix_counts_leading_tokens_that_agree() -> None:
    base = list(range(300))
    for length in (0, 1, 63, 64, 65, 128, 299, 300):
        changed = base[:length] + [-1] * 5
        assert common_prefix(base, changed) == length
        assert common_prefix(base, base[:length]) == length
    assert common_prefix([], []) == 0


@pytest.mark.parametrize(
    ("n_operations", "sizes"),
    [
        (8_000, {"n_pages": 24, "page_size": 4, "longest": 44, "most": 5}),
        (300, {"n_pages": 120, "page_size": 16, "longest": 500, "most": 8}),
    ],
)
def test_random_operations_leave_the_table_sound_after_each(n_operations: int, sizes: dict[str, int]) -> None:
    """`benchmarks/page_table_operations.py` does 100,000."""
    operations = PageTableOperations(1, **sizes)
    operations.run(n_operations)
    operations.finish()
    for what in ("reused", "grown", "truncated", "pinned", "ended", "dropped", "trace: other text", "trace: evicted"):
        assert operations.counts[what] >= n_operations / 1000, what
    assert operations.memory.table.n_evicted > n_operations / 10


def plant_wrong_count(table: PageTable) -> None:
    table.pages[0].n_holders += 1


def plant_wrong_key(table: PageTable) -> None:
    page = table.pages[0]
    assert page.key is not None
    del table._by_key[page.key]
    page.key = b"wrong"
    table._by_key[page.key] = page.index


def plant_changed_token(table: PageTable) -> None:
    table.pages[0].token_ids[1] += 1


def plant_page_free_and_in_use(table: PageTable) -> None:
    table._free.append(0)


def plant_page_twice_free(table: PageTable) -> None:
    table._free.append(table._free[0])


def plant_lost_page(table: PageTable) -> None:
    table._free.pop()


def plant_wrong_root(table: PageTable) -> None:
    table.pages[1].root = b"another"


def plant_wrong_child_count(table: PageTable) -> None:
    table.pages[0].n_children -= 1


def plant_lost_parent(table: PageTable) -> None:
    table.pages[1].parent_key = b"nobody"


def plant_missing_key(table: PageTable) -> None:
    table._drop_key(table.pages[3])


def plant_missing_sibling(table: PageTable) -> None:
    table._children[table.root_key].pop(ord("t"))


def plant_empty_siblings(table: PageTable) -> None:
    table._children[table.root_key][-5] = []


def plant_page_held_twice_by_one(table: PageTable) -> None:
    held = next(iter(table._holds.values()))
    held.pages[1] = held.pages[0]


def plant_wrong_token_count(table: PageTable) -> None:
    next(iter(table._holds.values())).n_tokens -= 1


def plant_too_few_pages(table: PageTable) -> None:
    held = next(iter(table._holds.values()))
    table.pages[held.pages.pop()].n_holders -= 1


def plant_wrong_held_key(table: PageTable) -> None:
    next(iter(table._holds.values())).keys[0] = b"wrong"


def plant_shared_unfinished_page(table: PageTable) -> None:
    first, second = table._holds.values()
    table.pages[second.pages[-1]].n_holders -= 1
    second.pages[-1] = first.pages[-1]
    table.pages[second.pages[-1]].n_holders += 1


def plant_unfindable_cached_page(table: PageTable) -> None:
    table._evictable.clear()


def plant_head_older_than_tail(table: PageTable) -> None:
    cached_head = next(page for page in table.pages if page.n_holders == 0 and page.n_children)
    cached_head.last_used = -1


def plant_wrong_cached_count(table: PageTable) -> None:
    table._n_cached += 1


def plant_two_equal_keys(table: PageTable) -> None:
    table.pages[1].key = table.pages[0].key


def plant_overfull_page(table: PageTable) -> None:
    table.pages[0].token_ids.append(7)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (plant_wrong_count, "counts 2 holders"),
        (plant_wrong_key, "does not follow from its tokens"),
        (plant_changed_token, "does not follow from its tokens"),
        (plant_page_free_and_in_use, "is free and in use"),
        (plant_page_twice_free, "times in the free list"),
        (plant_lost_page, "not in the free list"),
        (plant_wrong_root, "hangs below another root"),
        (plant_wrong_root, "hangs below a page of another root"),
        (plant_wrong_child_count, "counts 0 children"),
        (plant_lost_parent, "has lost its parent"),
        (plant_missing_key, "is full but has no key"),
        (plant_missing_sibling, "table of children"),
        (plant_empty_siblings, "keeps an empty list"),
        (plant_page_held_twice_by_one, "lists a page twice"),
        (plant_wrong_token_count, "its sequence of"),
        (plant_too_few_pages, "pages for"),
        (plant_wrong_held_key, "wrong key for page"),
        (plant_shared_unfinished_page, "shared while it is being filled"),
        (plant_unfindable_cached_page, "never be found"),
        (plant_head_older_than_tail, "looks older"),
        (plant_wrong_cached_count, "cached pages are counted"),
        (plant_two_equal_keys, "two pages have the same key"),
        (plant_overfull_page, "more than 4"),
    ],
)
def test_the_integrity_check_sees_a_planted_fault(plant: Callable[[PageTable], None], words: str) -> None:
    memory = PageMemory(PageTable(n_pages=12, page_size=4))
    fill(memory, "the cat sat")
    fill(memory, "another t")
    memory.release(fill(memory, "gone but"))
    memory.check()
    plant(memory.table)
    with pytest.raises(CacheIntegrityError, match=words):
        check_integrity(memory.table)

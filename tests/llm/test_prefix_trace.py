"""Why a prompt took from the page table what it took: every reason, on texts of letters."""

from __future__ import annotations

import pytest

from exl2_rag.llm.page_table import PageTable
from exl2_rag.llm.prefix_trace import PrefixTrace, trace_prefix
from tests.support.page_memory import PageMemory

ONE, OTHER = b"one tenant".ljust(32), b"another tenant".ljust(32)


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def text(token_ids: tuple[int, ...]) -> str:
    return "".join(map(chr, token_ids))


@pytest.fixture
def memory() -> PageMemory:
    return PageMemory(PageTable(n_pages=8, page_size=4))


def keep(memory: PageMemory, *texts: str, root: bytes | None = None) -> None:
    for one in texts:
        held = memory.hold(ids(one), limit=len(one), root=root)
        assert memory.compute(held, ids(one)) == len(one)
        memory.release(held)


def trace(memory: PageMemory, prompt: str, root: bytes | None = None) -> PrefixTrace:
    roots = reversed(memory.table.roots)
    return trace_prefix(memory.table, ids(prompt), len(prompt) - 1, root=root, other_roots=roots)


@pytest.mark.parametrize("prompt", ["the cat sat.", "the cat sat", "the ca"])
def test_only_the_last_token_is_missing(memory: PageMemory, prompt: str) -> None:
    keep(memory, "the cat sat on")
    keep(memory, "the cat sat.")
    found = trace(memory, prompt)
    assert (found.reason, found.n_reused, found.differs_at) == ("last token", len(prompt) - 1, len(prompt) - 1)


@pytest.mark.parametrize(
    ("prompt", "differs_at", "nearest"),
    [("the cat sang", 10, "t on"), ("the dog sat", 4, "cat sat on"), ("a cat sat on", 0, "the cat sat on")],
)
def test_the_nearest_cached_text_goes_on_differently(
    memory: PageMemory, prompt: str, differs_at: int, nearest: str
) -> None:
    keep(memory, "the cat sat on")
    found = trace(memory, prompt)
    assert found.reason == "other text"
    assert found.n_reused == found.differs_at == differs_at
    assert text(found.nearest) == nearest


def test_among_several_the_one_that_agrees_longest_is_nearest(memory: PageMemory) -> None:
    keep(memory, "the cat sat on", "the cow", "the crow")
    assert text(trace(memory, "the coin").nearest) == "w"
    assert text(trace(memory, "the dog").nearest) == "crow"  # none agrees: the youngest


def test_what_was_never_there(memory: PageMemory) -> None:
    assert trace(memory, "the cat").reason == "never seen"
    keep(memory, "the cat")
    found = trace(memory, "the cat sat on the mat")
    assert (found.reason, found.n_reused, found.nearest) == ("never seen", 7, ())


def test_what_was_evicted_is_known_to_the_token(memory: PageMemory) -> None:
    keep(memory, "the cat sat on the mat")
    keep(memory, "a long text that needs all pages")
    found = trace(memory, "the cat sat on the roof")
    assert (found.reason, found.n_reused) == ("evicted", 0)
    assert found.n_evicted == len("the cat sat on the ")


def test_a_tail_that_was_evicted(memory: PageMemory) -> None:
    keep(memory, "the cat sat on the mat", "another text of")
    held = memory.hold(ids("xyzxyzx"), limit=7)
    memory.compute(held, ids("xyzxyzx"))
    found = trace(memory, "the cat sat on the mat.")
    assert found.reason == "evicted"
    assert found.n_reused + found.n_evicted == len("the cat sat on the mat")
    assert 0 < found.n_reused < 22


def test_what_was_dropped_counts_as_evicted(memory: PageMemory) -> None:
    keep(memory, "the cat sat on")
    memory.table.drop(ids("the cat sat on"))
    assert trace(memory, "the cat sat on").reason == "evicted"


def test_the_record_of_evicted_pages_is_bounded() -> None:
    memory = PageMemory(PageTable(n_pages=4, page_size=4))
    for number in range(500):
        keep(memory, f"{number:04}")
    assert trace(memory, "0480.").reason == "evicted"
    assert trace(memory, "0001.").reason == "other text"
    assert len(memory.table.evicted) == 64


def test_the_same_text_for_another_tenant_is_said_but_not_shown(memory: PageMemory) -> None:
    keep(memory, "the cat sat", root=ONE)
    found = trace(memory, "the cat sat", root=OTHER)
    assert (found.reason, found.n_reused, found.nearest, found.other_root) == ("other identity", 0, (), ONE)
    assert trace(memory, "the cat sat", root=ONE).reason == "last token"
    assert trace(memory, "a dog", root=OTHER).reason == "never seen"


def test_a_trace_changes_nothing(memory: PageMemory) -> None:
    keep(memory, "the cat sat on")
    before = [(page.token_ids, page.key, page.last_used, page.n_holders) for page in memory.table.pages]
    for prompt in ("the cat", "the dog", "x"):
        trace(memory, prompt)
    assert before == [(page.token_ids, page.key, page.last_used, page.n_holders) for page in memory.table.pages]
    memory.check()


def test_known_keys_are_used_and_prolonged(memory: PageMemory) -> None:
    keep(memory, "the cat sat on")
    memory.table.drop()
    known: list[bytes] = []
    prompt = ids("the cat sat on the mat")
    found = trace_prefix(memory.table, prompt, len(prompt) - 1, known_keys=known)
    assert found.n_evicted == len("the cat sat on")
    again = trace_prefix(memory.table, prompt, len(prompt) - 1, known_keys=known)
    assert again == found
    assert known == [key for key in known if len(key) == 16]
    assert len(known) == 4

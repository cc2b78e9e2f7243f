"""What a prompt would find below the page table agrees with what it finds when it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from exl2_rag.llm.cache_explanation import CacheExplanation
from exl2_rag.llm.engine import Engine
from tests.llm.kv_store.test_tiers import PAGE_BYTES, answer, text, tiered, warm

PROMPT = text(1)  # 41 tokens: ten pages of 4, and one


def explain(engine: Engine, tokens: list[int], **options: str) -> CacheExplanation:
    return engine.explain(tuple(tokens), **options)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that holds the pages of `PROMPT`."""
    engine = tiered(tmp_path)
    warm(engine, PROMPT)
    engine.close()
    return tmp_path


def test_whole_pages_are_found_on_disk_and_then_come_from_there(store: Path) -> None:
    engine = tiered(store)
    found = explain(engine, PROMPT)
    assert (found.from_disk, found.from_memory, found.reason, found.differs_at) == (40, 0, "last token", None)
    sequence = answer(engine, PROMPT)
    assert sequence.n_disk_tokens == sequence.usage().cached_tokens == found.reused_tokens
    again = explain(engine, PROMPT)
    assert (again.from_disk, again.from_memory) == (0, 40)
    engine.close()


@pytest.mark.parametrize(("differs_at", "from_disk"), [(0, 0), (2, 0), (4, 4), (22, 20)])
def test_the_nearest_stored_text_is_shown(store: Path, differs_at: int, from_disk: int) -> None:
    engine = tiered(store)
    other = [*PROMPT[:differs_at], PROMPT[differs_at] % 96 + 1, *PROMPT[differs_at + 1 :]]
    found = explain(engine, other)
    assert (found.from_disk, found.reason, found.differs_at) == (from_disk, "other text", differs_at)
    assert found.cached_window[found.n_before] == PROMPT[differs_at]
    engine.close()


def test_what_memory_holds_counts_first(store: Path) -> None:
    engine = tiered(store)
    answer(engine, [*PROMPT[:14], 5, 6, 7])
    found = explain(engine, PROMPT)
    assert (found.from_memory, found.from_disk) == (12, 28)
    engine.close()


def test_what_a_prompt_shares_with_memory_beyond_its_stored_pages_is_not_lost(store: Path) -> None:
    engine = tiered(store)
    longer = [*PROMPT[:40], 3, 4, 5]
    answer(engine, longer)
    found = explain(engine, [*longer[:42], 9, 9])
    assert (found.from_memory, found.from_disk, found.differs_at) == (42, 0, 42)
    engine.close()


def test_a_prompt_that_memory_has_as_a_whole_asks_no_store(store: Path) -> None:
    engine = tiered(store)
    longer = [*PROMPT[:40], 3, 4, 5]
    answer(engine, longer)
    found = explain(engine, longer)
    assert (found.from_memory, found.from_disk, found.reason) == (42, 0, "last token")
    engine.close()


def test_pages_in_host_memory_are_told_from_those_on_disk() -> None:
    engine = tiered(None, ram_bytes=100 * PAGE_BYTES, n_pages=14)
    answer(engine, PROMPT)
    answer(engine, text(2))
    found = explain(engine, PROMPT)
    assert found.from_ram > 0
    assert found.from_disk == 0
    sequence = answer(engine, PROMPT)
    assert sequence.n_ram_tokens == found.from_ram
    assert sequence.usage().cached_tokens == found.reused_tokens


def test_another_tenants_pages_on_disk_are_not_found(store: Path) -> None:
    engine = tiered(store)
    found = explain(engine, PROMPT, cache_salt="a")
    assert (found.reused_tokens, found.reason, found.cached_window) == (0, "never seen", ())
    engine.close()

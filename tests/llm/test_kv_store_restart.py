"""`ExL2LLM` over a store: what survives a restart, what is only a miss, and what is refused. On real models."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.errors import KVStoreError, RequestError, SettingsError
from tests.support.byte_tokenizer import BOS_ID
from tests.support.synthetic import make_model_dir

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SIZES = {"cache_tokens": 2048, "max_seq_len": 512}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "exl2", quantised=True)


@pytest.fixture(autouse=True)
def own_user_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def words(n_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97, 123) for _ in range(n_tokens)]


def haystack(needle: int) -> list[int]:
    """Prompts that differ in a few tokens far from their end."""
    return [BOS_ID, *words(60, 0), *words(8, 100 + needle), *words(150, 0)]


@pytest.mark.parametrize("cache_dtype", ["fp32", "fp16", "bf16", "q8", "q4"])
def test_after_a_restart_each_prompt_gets_the_text_of_its_own_needle_from_disk(
    model_dir, tmp_path, cache_dtype
) -> None:
    with ExL2LLM(model_dir, cache_dtype=cache_dtype, **SIZES) as uninterrupted:
        expected = [uninterrupted.generate(haystack(needle), GREEDY).token_ids for needle in range(5)]
    assert len(set(expected)) == 5, "the needles make no difference, so the test proves nothing"
    with ExL2LLM(model_dir, cache_dtype=cache_dtype, kv_store=tmp_path, **SIZES) as first:
        for needle in range(5):
            first.warm(haystack(needle))
    with ExL2LLM(model_dir, cache_dtype=cache_dtype, kv_store=tmp_path, **SIZES) as second:
        for needle in (3, 0, 4, 1, 2):
            result = second.generate(haystack(needle), GREEDY)
            assert result.token_ids == expected[needle]
            assert result.usage.cached_tokens == 192  # 6 pages of 32; the 219 end within the seventh
        tiers = second.cache_report().tiers
        assert tiers is not None
        assert tiers.disk_tokens == 32 + 5 * 160  # the first page is shared, and then in the cache
        assert tiers.store is not None
        assert tiers.store.damaged_pages == 0


def test_a_store_of_another_model_dtype_or_page_size_is_only_a_miss(model_dir, tmp_path) -> None:
    store = tmp_path / "store"
    with ExL2LLM(model_dir, kv_store=store, **SIZES) as llm:
        llm.warm(haystack(1))
    fine_tune = make_model_dir(tmp_path / "other", quantised=True, seed=1)  # same shapes, other numbers
    for other, options in [
        (fine_tune, {}),
        (model_dir, {"cache_dtype": "bf16"}),
        (model_dir, {"page_size": 16}),
        (model_dir, {"precision": "exact", "cache_dtype": "fp16"}),
    ]:
        with ExL2LLM(other, **options, **SIZES) as plain:
            expected = plain.generate(haystack(1), GREEDY)
        with ExL2LLM(other, kv_store=store, **options, **SIZES) as llm:
            result = llm.generate(haystack(1), GREEDY)
        assert result.usage.cached_tokens == 0
        assert result.token_ids == expected.token_ids
    with ExL2LLM(model_dir, kv_store=store, **SIZES) as llm:
        assert llm.generate(haystack(1), GREEDY).usage.cached_tokens == 192


def test_a_second_engine_on_the_same_store_reads_what_the_first_writes(model_dir, tmp_path) -> None:
    with (
        ExL2LLM(model_dir, kv_store=tmp_path, **SIZES) as first,
        ExL2LLM(model_dir, kv_store=tmp_path, **SIZES) as second,
    ):
        first.warm(haystack(1))
        first._thread.call(first._engine.tiers.flush)
        result = second.generate(haystack(1), GREEDY)
        assert result.usage.cached_tokens == 192
        assert second.cache_report().tiers.store.mode == "reading"
        with pytest.raises(KVStoreError, match="another process does"):
            second.purge("anything")


def test_purging_a_document_reaches_pages_of_requests_that_named_it(model_dir, tmp_path) -> None:
    system, document = [BOS_ID, *words(100, 0)], words(100, 1)
    with ExL2LLM(model_dir, kv_store=tmp_path, kv_ram_bytes=10**7, **SIZES) as llm:
        for _ in range(2):
            llm.generate([*system, *document], GREEDY, sources={"report.pdf": len(system)})
        llm._thread.call(llm._engine.tiers.flush)
        assert llm.purge("report.pdf") >= 6
        assert llm.purge("report.pdf") == 0
        assert llm.generate([*system, *document], GREEDY).usage.cached_tokens in range(96, 102)
    with ExL2LLM(model_dir, kv_store=tmp_path, **SIZES) as llm:
        assert llm.generate([*system, *document], GREEDY).usage.cached_tokens == 96


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("report.pdf", "put it into a list"),
        ([""], "must be texts"),
        ({"a": -1}, "positions of 0 or more"),
        ([3], "texts"),
    ],
)
def test_sources_that_make_no_sense_are_refused(model_dir, tmp_path, sources, message) -> None:
    with ExL2LLM(model_dir, **SIZES) as llm, pytest.raises(RequestError, match=message):
        llm.generate([1, 2, 3], GREEDY, sources=sources)


def test_what_cannot_be_a_store_is_refused_before_the_model_is_read(model_dir, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KVStoreError, match="cannot be used as a directory to write to"):
        ExL2LLM(model_dir, kv_store=tmp_path / "file", **SIZES)
    with pytest.raises(SettingsError, match="kv_store_bytes must be at least"):
        ExL2LLM(model_dir, kv_store=tmp_path / "store", kv_store_bytes=1000, **SIZES)
    with pytest.raises(SettingsError, match="kv_ram_bytes must hold at least one page"):
        ExL2LLM(model_dir, kv_ram_bytes=10, **SIZES)

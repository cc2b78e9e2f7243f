"""Tiers below a toy engine, whose next token is a hash of every token it reads back from its pages."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from exl2_rag.errors import ShapeError
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.kv_store.disk_store import DiskStore
from exl2_rag.llm.kv_store.page_store import PageRecord, PageStore
from exl2_rag.llm.kv_store.ram_tier import RamTier
from exl2_rag.llm.kv_store.rates import LoadOrRecompute
from exl2_rag.llm.kv_store.store_directory import StoreIdentity, segments
from exl2_rag.llm.kv_store.tiers import CacheTiers
from exl2_rag.llm.quantised_kv_cache import QuantisedKVCache
from exl2_rag.llm.request import GenerationRequest
from exl2_rag.llm.sequence import Sequence
from tests.llm.test_engine import greedy, run
from tests.support.toy_model import VOCAB, ToyModel, expected_tokens, toy_engine

PAGE_SIZE = 4
PAGE_BYTES = 2 * 4 * PAGE_SIZE
IDENTITY = StoreIdentity(b"\x07" * 32, PAGE_SIZE, PAGE_BYTES)
QUOTA = 2**20


def tiered(
    directory: Path | None, ram_bytes: int = 0, model: ToyModel | None = None, identity=IDENTITY, **sizes: int
) -> Engine:
    def tiers(cache: KVCache) -> CacheTiers:
        store = None if directory is None else DiskStore(directory, identity, QUOTA)
        return CacheTiers(cache, PAGE_SIZE, ram=RamTier(ram_bytes, PAGE_BYTES) if ram_bytes else None, store=store)

    return toy_engine(model, make_tiers=tiers, **sizes)


def text(seed: int, length: int = 41) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, VOCAB) for _ in range(length)]


def ask(engine: Engine, tokens: list[int], n_new: int = 6, **options) -> Sequence:
    sequence = engine.prepare(GenerationRequest(tuple(tokens), greedy(n_new), **options))
    engine.add(sequence)
    return sequence


def answer(engine: Engine, tokens: list[int], **options) -> Sequence:
    """Ask, check every token of the reply, and return the sequence."""
    sequence = ask(engine, tokens, **options)
    assert run(engine, sequence)[0].token_ids == expected_tokens(tokens, 6)
    return sequence


def purge(engine: Engine, source: str) -> int:
    return engine.purge_memory(source) + engine.tiers.store.purge(source)


def warm(engine: Engine, tokens: list[int], **options) -> None:
    sequence = engine.prepare_prompt(tuple(tokens), **options)
    engine.add(sequence)
    run(engine, sequence)


# --- disk ------------------------------------------------------------------------------------------------------------


def test_after_a_restart_every_needle_is_found_and_its_tokens_come_from_disk(tmp_path) -> None:
    prompts = [[*text(0, 40), needle, *text(needle, 30)] for needle in range(1, 6)]
    engine = tiered(tmp_path)
    before = [answer(engine, prompt).token_ids for prompt in prompts * 2]  # the second use brings a page to disk
    engine.close()
    model = ToyModel()
    engine = tiered(tmp_path, model=model)
    for prompt, expected in zip(prompts, before, strict=False):
        sequence = answer(engine, prompt)
        assert sequence.token_ids == expected
        assert sequence.usage().cached_tokens == 68  # whole pages below the last token
        assert sequence.n_disk_tokens in (68, 28)  # the shared 40 are in the cache after the first
    report = engine.report().tiers
    assert report is not None
    assert report.disk_tokens == 40 + 5 * 28
    assert model.n_computed < 5 * 12
    engine.close()


def test_a_prompt_used_once_is_not_written_and_its_second_use_may_be_in_another_process(tmp_path) -> None:
    prompt = text(1)
    for expected_disk_tokens in (0, 0, 40, 40):
        engine = tiered(tmp_path)
        assert answer(engine, prompt).n_disk_tokens == expected_disk_tokens
        n_pages = engine.tiers.store.report().pages
        engine.close()
    assert n_pages >= 10


def test_warming_and_pinning_write_at_once(tmp_path) -> None:
    engine = tiered(tmp_path)
    warm(engine, text(1))
    warm(engine, text(2), keep_pages=True)
    engine.close()
    engine = tiered(tmp_path)
    assert answer(engine, text(1)).n_disk_tokens == 40
    assert answer(engine, text(2)).n_disk_tokens == 40
    engine.close()


def test_tenants_do_not_share_pages_on_disk(tmp_path) -> None:
    engine = tiered(tmp_path)
    warm(engine, text(1), cache_salt="alice")
    engine.close()
    engine = tiered(tmp_path)
    assert answer(engine, text(1), cache_salt="bob").usage().cached_tokens == 0
    assert answer(engine, text(1)).usage().cached_tokens == 0
    assert answer(engine, text(1), cache_salt="alice").n_disk_tokens == 40
    engine.close()


def test_a_store_of_another_identity_is_only_a_miss(tmp_path) -> None:
    engine = tiered(tmp_path)
    warm(engine, text(1))
    engine.close()
    engine = tiered(tmp_path, identity=StoreIdentity(b"\x08" * 32, PAGE_SIZE, PAGE_BYTES))
    assert answer(engine, text(1)).usage().cached_tokens == 0
    engine.close()


def test_damage_on_disk_never_changes_a_token(tmp_path) -> None:
    rng = random.Random(5)
    prompts = [text(seed, 61) for seed in range(4)]
    engine = tiered(tmp_path)
    for prompt in prompts:
        warm(engine, prompt)
    engine.close()
    for _ in range(6):
        path = next(iter(segments(tmp_path / IDENTITY.folder_name).values()))
        content = bytearray(path.read_bytes())
        for _ in range(40):
            place = rng.randrange(0, len(content), 4096) + rng.randrange(70)
            if place < len(content):
                content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        engine = tiered(tmp_path)
        for prompt in prompts:
            answer(engine, prompt)
        engine.close()


def test_a_store_that_stops_reading_or_writing_under_a_running_engine_changes_nothing(tmp_path) -> None:
    engine = tiered(tmp_path, n_pages=32)
    warm(engine, text(1))
    store = engine.tiers.store
    store.flush()
    store._index._database.close()  # as if the index had gone bad
    for seed in (2, 3, 1, 2, 3, 1):
        answer(engine, text(seed, 61))
    assert store.report().mode == "off"
    engine.close()


def test_pages_that_load_slower_than_they_compute_are_computed(tmp_path) -> None:
    engine = tiered(tmp_path)
    warm(engine, text(1))
    engine.close()
    engine = tiered(tmp_path)
    engine.tiers.rates.disk.measured(1, 10.0)
    engine.tiers.rates.prefill_tokens_per_s = 1e6
    sequence = answer(engine, text(1))
    assert sequence.usage().cached_tokens == 0
    assert engine.report().tiers.declined_pages == 10
    engine.close()


def test_a_declined_disk_is_tried_again_now_and_then() -> None:
    rates = LoadOrRecompute()
    assert rates.should_load(100, 32)  # nothing is known
    rates.disk.measured(100, 1.0)
    rates.prefill_tokens_per_s = 64
    tried = [rates.should_load(100, 32) for _ in range(64)]
    assert sum(tried) == 4
    rates.prefill_tokens_per_s = 0.032
    assert rates.should_load(100, 32)


def test_loading_beside_running_requests_is_cut_into_short_pieces(tmp_path, monkeypatch) -> None:
    engine = tiered(tmp_path)
    warm(engine, text(1, 161))
    engine.close()
    engine = tiered(tmp_path)
    monkeypatch.setattr("exl2_rag.llm.kv_store.tier_loader.LOAD_SLICE_S", 0.0)
    running = ask(engine, text(2), n_new=60)
    for _ in range(3):
        engine.step()
    late = ask(engine, text(1, 161))
    steps = 0
    news = []
    while late.n_cached_tokens is None:
        news += engine.step()
        engine.check_integrity()
        steps += 1
    assert steps >= 40
    assert running.n_new >= 38  # one token in each of those steps
    assert late.n_disk_tokens == 160
    first = [token for one in news if one.sequence is late for token in one.piece.token_ids]
    assert first + run(engine, running, late)[1].token_ids == expected_tokens(text(1, 161), 6)
    engine.close()


# --- host memory -----------------------------------------------------------------------------------------------------


def test_pages_evicted_from_the_cache_come_back_from_host_memory() -> None:
    engine = tiered(None, 100 * PAGE_BYTES, n_pages=24)
    prompts = [text(seed, 61) for seed in range(5)]
    for prompt in prompts:
        answer(engine, prompt)
    assert engine.report().evicted_pages > 40
    for prompt in prompts[:3]:
        sequence = answer(engine, prompt)
        assert sequence.n_ram_tokens > 50
        assert sequence.usage().cached_tokens == 60
    assert engine.report().tiers.ram_tokens > 150


def test_host_memory_keeps_to_its_budget_and_drops_tails_first() -> None:
    engine = tiered(None, 20 * PAGE_BYTES, n_pages=24)
    for seed in range(6):
        answer(engine, text(seed, 61))
    report = engine.report().tiers.ram
    assert report.used_bytes <= 20 * PAGE_BYTES
    assert report.pages == 20
    assert report.evicted_pages > 0
    ram = engine.tiers.ram
    assert all(
        slot.name.parent_key in ram
        or slot.name.parent_key == slot.root_key
        or engine._scheduler.table.find(slot.name.parent_key) is not None
        for slot in list(ram._slots.values())[10:]
    )


def test_host_memory_gives_nothing_whose_tokens_differ() -> None:
    engine = tiered(None, 100 * PAGE_BYTES, n_pages=24)
    for seed in range(4):
        answer(engine, text(seed, 61))
    for slot in engine.tiers.ram._slots.values():
        slot.name = type(slot.name)(slot.name.key, slot.name.parent_key, (1, 2, 3, 4))
    assert answer(engine, text(0, 61)).n_ram_tokens == 0


@pytest.mark.parametrize("with_disk", [False, True])
def test_random_requests_through_all_tiers_give_the_tokens_of_the_model_alone(tmp_path, with_disk) -> None:
    rng = random.Random(3)
    shared = [text(seed, rng.randrange(4, 60)) for seed in range(6)]
    for _ in range(3 if with_disk else 1):
        engine = tiered(tmp_path if with_disk else None, 30 * PAGE_BYTES, n_pages=40, max_seq_len=120)
        for _ in range(25):
            prompts = []
            for _ in range(rng.randrange(1, 4)):
                head = rng.choice(shared)
                prompts.append(
                    [*head[: rng.randrange(1, len(head) + 1)], *text(rng.randrange(9), rng.randrange(1, 20))]
                )
            sequences = [ask(engine, prompt, cache_salt=rng.choice([None, "a"])) for prompt in prompts]
            for prompt, outcome in zip(prompts, run(engine, *sequences), strict=True):
                assert outcome.token_ids == expected_tokens(prompt, 6)
        report = engine.report().tiers
        engine.close()
    assert report.ram_tokens > 0
    assert not with_disk or report.disk_tokens > 0


# --- purge -----------------------------------------------------------------------------------------------------------


def test_purging_a_source_reaches_cache_host_memory_and_disk(tmp_path) -> None:
    engine = tiered(tmp_path, 100 * PAGE_BYTES, n_pages=24)
    system = text(0, 20)
    secret, public = [*system, *text(1, 30)], [*system, *text(2, 30)]
    for _ in range(2):
        answer(engine, secret, sources={"secret": 20})
        answer(engine, public, sources={"public": 20})
    for seed in range(5, 8):
        answer(engine, text(seed, 61))
    engine.tiers.flush()
    assert purge(engine, "secret") >= 7
    assert answer(engine, public, sources={"public": 20}).usage().cached_tokens >= 48
    assert answer(engine, secret, sources={"secret": 20}).usage().cached_tokens == 20
    engine.close()
    engine = tiered(tmp_path)
    assert engine.tiers.store._written_index.sources().keys() == {"public"}  # used once since: not written
    engine.close()


def test_a_purge_reaches_pages_that_came_back_from_disk(tmp_path) -> None:
    engine = tiered(tmp_path)
    for _ in range(2):
        answer(engine, text(1), sources=["doc"])
    engine.close()
    engine = tiered(tmp_path)
    answer(engine, text(1))  # this time nobody says where it is from
    assert purge(engine, "doc") >= 20  # in the cache, and on disk
    assert answer(engine, text(1)).usage().cached_tokens == 0
    engine.close()


# --- page images -----------------------------------------------------------------------------------------------------


def make(kind: str) -> KVCache:
    sizes = {
        "n_layers": 3,
        "n_pages": 5,
        "page_size": 4,
        "n_kv_heads": 2,
        "head_dim": 32,
        "device": torch.device("cpu"),
    }
    if kind.startswith("q"):
        return QuantisedKVCache(**sizes, bits=int(kind[1]))
    return KVCache(**sizes, dtype={"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind])


def parts_of(cache: KVCache) -> list[torch.Tensor]:
    pages = [one for layer in zip(cache.k_pages, cache.v_pages, strict=True) for one in layer]
    return [part for one in pages for part in ((one,) if isinstance(one, torch.Tensor) else (one.codes, one.scales))]


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "q8", "q6", "q4"])
def test_a_page_goes_out_layer_by_layer_and_comes_back_bit_for_bit(kind) -> None:
    cache = make(kind)
    generator = torch.Generator().manual_seed(1)
    for part in parts_of(cache):
        part.view(torch.uint8).random_(0, 255, generator=generator)
    image = cache.read_page(2)
    expected = b"".join(part[2].contiguous().view(torch.uint8).numpy().tobytes() for part in parts_of(cache))
    assert bytes(image) == expected
    assert cache.page_bytes == len(image) == cache.size_bytes // 5
    others = [part[[0, 1, 3]].clone() for part in parts_of(cache)]
    cache.write_page(4, memoryview(image))
    assert cache.read_page(4) == image
    for part, before in zip(parts_of(cache), others, strict=True):
        assert torch.equal(part[[0, 1, 3]].view(torch.uint8), before.view(torch.uint8))
    with pytest.raises(ShapeError, match="expected the image of a page"):
        cache.write_page(0, image[:-1])


def test_planned_copies_are_carried_out_before_a_restored_page_is_written(tmp_path, monkeypatch) -> None:
    engine = tiered(tmp_path)
    warm(engine, text(1))
    engine.close()
    engine = tiered(tmp_path)
    answer(engine, text(2))
    calls: list[str] = []
    cache = engine.tiers._images
    copy_rows, write_page = cache.copy_rows, cache.write_page
    monkeypatch.setattr(cache, "copy_rows", lambda *args: (calls.append("copy"), copy_rows(*args)))
    monkeypatch.setattr(cache, "write_page", lambda *args: (calls.append("write"), write_page(*args)))
    forked = [*text(2)[:38], 1, 2, 3]  # agrees with two rows of a page
    sequences = [ask(engine, forked), ask(engine, text(1))]
    outcomes = run(engine, *sequences)
    assert calls == ["copy", *["write"] * 10]
    assert outcomes[0].token_ids == expected_tokens(forked, 6)
    assert outcomes[1].token_ids == expected_tokens(text(1), 6)
    engine.close()


def test_an_explanation_counts_what_would_come_from_host_memory_and_disk(tmp_path) -> None:
    engine = tiered(tmp_path, 100 * PAGE_BYTES, n_pages=24)
    warm(engine, text(1, 61))
    engine.tiers.flush()
    for seed in range(2, 6):
        answer(engine, text(seed, 61))
    found = engine.explain(tuple(text(1, 61)))
    assert (found.from_memory, found.from_ram, found.from_disk) == (0, 60, 0)
    assert found.reason == "last token"
    engine.close()
    engine = tiered(tmp_path)
    found = engine.explain((*text(1, 59), 1, 2, 3, 4))
    assert (found.from_memory, found.from_ram, found.from_disk) == (0, 0, 56)
    assert (found.reason, found.differs_at) == ("other text", 59)  # where the nearest stored text goes on differently
    answer(engine, text(1, 50))
    found = engine.explain(tuple(text(1, 61)))
    assert (found.from_memory, found.from_ram, found.from_disk) == (48, 0, 12)
    assert engine.tiers.store.report().read_pages == 12
    engine.close()


def test_pages_that_a_running_request_holds_go_when_it_ends(tmp_path) -> None:
    engine = tiered(tmp_path, 100 * PAGE_BYTES)
    running = ask(engine, text(1), n_new=20, sources=["doc"])
    for _ in range(4):
        engine.step()
    purge(engine, "doc")
    run(engine, running)
    assert running.token_ids[41:] == expected_tokens(text(1), 20)
    answer(engine, text(2))
    assert answer(engine, text(1)).usage().cached_tokens == 0
    engine.close()


def test_a_pinned_prompt_is_pinned_on_disk_until_its_last_pin_is_released(tmp_path) -> None:
    engine = tiered(tmp_path)

    def pinned_on_disk() -> int:
        engine.tiers.flush()
        return engine.tiers.store._written_index._rows("SELECT count(*) FROM pages WHERE pinned")[0][0]

    pins = [engine.prepare_prompt(tuple(text(1)[:length]), keep_pages=True) for length in (41, 25)]
    for one in pins:
        engine.add(one)
        run(engine, one)
    assert pinned_on_disk() == 10
    engine.unpin(pins[0])
    assert pinned_on_disk() == 6
    engine.unpin(pins[1])
    assert pinned_on_disk() == 0
    engine.close()


class DictStore(PageStore):
    """The least that can be plugged in: five methods over a dict."""

    def __init__(self) -> None:
        self.pages: dict[bytes, PageRecord] = {}

    def contains(self, keys):
        return {key for key in keys if key in self.pages}

    def get_many(self, names):
        for name in names:
            if name.key not in self.pages or self.pages[name.key].name != name:
                return
            yield memoryview(self.pages[name.key].image)

    def put_many(self, records):
        self.pages |= {one.name.key: one for one in records}
        return len(records)

    def evict(self, keys):
        raise NotImplementedError

    def purge(self, source):
        doomed = [key for key, one in self.pages.items() if source in one.sources]
        for key in doomed:
            del self.pages[key]
        return len(doomed)


def test_another_store_can_be_plugged_in() -> None:
    store = DictStore()
    for n_disk_tokens in (0, 40):
        engine = toy_engine(make_tiers=lambda cache: CacheTiers(cache, PAGE_SIZE, ram=None, store=store))
        for _ in range(2):
            sequence = answer(engine, text(1), sources=["doc"])
        assert sequence.usage().cached_tokens == 40
        assert engine.report().tiers.disk_tokens == n_disk_tokens
        engine.close()
    assert purge(engine, "doc") >= 10

"""Pins that expire, pins that are refused, eviction by text and by tenant, and the report."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.errors import EngineClosedError, PinLimitError, RequestError
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.prefill_rate import PrefillRate
from exl2_rag.llm.request import GenerationRequest
from exl2_rag.llm.sequence import Sequence
from exl2_rag.llm.tenants import MAX_ROOTS, Tenants
from tests.support.synthetic import make_model_dir
from tests.support.toy_model import toy_engine

GREEDY = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)


class Clock:
    """Time that goes on when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def prompt(first: int, length: int) -> tuple[int, ...]:
    return tuple((first + 7 * place) % 96 + 1 for place in range(length))


def run(engine: Engine, sequence: Sequence) -> None:
    engine.add(sequence)
    while engine.has_work:
        for update in engine.step():
            assert update.error is None
        engine.check_integrity()


def pin(engine: Engine, token_ids: tuple[int, ...], ttl_s: float | None = None) -> Sequence:
    sequence = engine.prepare_prompt(token_ids, keep_pages=True, pin_ttl_s=ttl_s)
    run(engine, sequence)
    return sequence


def ask(engine: Engine, token_ids: tuple[int, ...], salt: str | None = None) -> int:
    """Run a request and return how many of its tokens were cached."""
    sequence = engine.prepare(GenerationRequest(token_ids, GREEDY, cache_salt=salt))
    run(engine, sequence)
    return sequence.usage().cached_tokens


# --- pins ------------------------------------------------------------------------------------------------------------


def test_a_pin_expires_by_the_clock_of_the_engine() -> None:
    clock = Clock()
    engine = toy_engine(clock=clock, n_pages=20)
    kept = pin(engine, prompt(1, 22), ttl_s=10)
    clock.now += 9.9
    assert engine.is_pinned(kept)
    assert engine.report().pinned_pages == 6
    assert engine.report().pins[0].expires_in_s == pytest.approx(0.1)
    clock.now += 0.2
    assert not engine.is_pinned(kept)  # before anything has noticed
    assert engine.report().pinned_pages == 0
    assert engine.report().cached_pages == 6
    engine.unpin(kept)
    engine.check_integrity()


def test_an_expired_pin_makes_room_for_a_request() -> None:
    clock = Clock()
    engine = toy_engine(clock=clock, n_pages=20)
    pin(engine, prompt(1, 40), ttl_s=10)
    clock.now += 11
    assert ask(engine, prompt(2, 76)) == 0
    assert ask(engine, prompt(1, 40)) < 39


def test_a_pin_can_be_renewed_until_it_is_over() -> None:
    clock = Clock()
    engine = toy_engine(clock=clock)
    kept = pin(engine, prompt(1, 22), ttl_s=10)
    clock.now += 9
    assert engine.renew_pin(kept, 10)
    clock.now += 9
    assert engine.is_pinned(kept)
    assert engine.renew_pin(kept, None)
    clock.now += 1e6
    assert engine.is_pinned(kept)
    assert engine.renew_pin(kept, 1)
    clock.now += 2
    assert not engine.renew_pin(kept, 1)


def test_pins_that_would_starve_the_cache_are_refused_and_hold_nothing() -> None:
    engine = toy_engine(n_pages=20)  # at most 15 pinned
    pin(engine, prompt(1, 40))
    too_much = engine.prepare_prompt(prompt(2, 21), keep_pages=True)
    with pytest.raises(PinLimitError, match=r"takes 6 more pages of 4 tokens; 10 of 20 are pinned.*at most 15"):
        engine.add(too_much)
    assert engine.report().pinned_pages == 10
    assert not engine.has_work
    pin(engine, prompt(2, 20))
    assert engine.report().pinned_pages == 15
    pin(engine, prompt(1, 40))  # the same pages once more
    assert engine.report().pinned_pages == 15


def test_pins_in_progress_count_as_well() -> None:
    engine = toy_engine(n_pages=20)
    engine.add(engine.prepare_prompt(prompt(1, 40), keep_pages=True))
    with pytest.raises(PinLimitError, match="10 of 20 are pinned already"):
        engine.add(engine.prepare_prompt(prompt(2, 40), keep_pages=True))


def test_a_cancelled_pin_holds_nothing() -> None:
    engine = toy_engine(n_pages=20)
    sequence = engine.prepare_prompt(prompt(1, 50), keep_pages=True)
    engine.add(sequence)
    engine.step()
    engine.abort(sequence)
    assert engine.report().pinned_pages == engine.report().running_pages == 0
    engine.check_integrity()


def test_a_reset_ends_pins() -> None:
    engine = toy_engine(n_pages=20)
    kept = pin(engine, prompt(1, 22))
    engine.reset()
    assert not engine.is_pinned(kept)
    assert not engine.renew_pin(kept, 1)
    engine.unpin(kept)
    engine.check_integrity()


# --- eviction --------------------------------------------------------------------------------------------------------


def test_evicting_a_text_takes_what_goes_on_from_it_and_leaves_what_others_share() -> None:
    engine = toy_engine()
    system, first, second = prompt(1, 16), prompt(40, 12), prompt(60, 12)
    for tail in (first, second, (*first, 5, 6, 7, 8, 9)):
        ask(engine, (*system, *tail))
    assert engine.evict((*system, *first)) > 3
    engine.check_integrity()
    assert ask(engine, (*system, *second)) == 27
    assert ask(engine, (*system, *first)) == 16
    assert engine.evict((*system, 90)) == 0
    assert engine.evict(system) > 0
    assert ask(engine, (*system, *second)) == 0


def test_eviction_leaves_pinned_pages() -> None:
    engine = toy_engine()
    pin(engine, prompt(1, 16))
    ask(engine, (*prompt(1, 16), *prompt(50, 20)))
    assert engine.evict(prompt(1, 16)) == 6
    assert engine.evict(None) == 0
    assert ask(engine, (*prompt(1, 16), 3)) == 16
    assert engine.report().pinned_pages == 4


def test_eviction_by_tenant_leaves_the_others() -> None:
    engine = toy_engine()
    for salt in (None, "a", "b"):
        ask(engine, prompt(1, 22), salt)
    n_pages = engine.report().cached_pages
    assert engine.evict(None, cache_salt="a") == n_pages // 3
    assert [ask(engine, prompt(1, 22), salt) for salt in (None, "a", "b")] == [21, 0, 21]
    assert engine.evict(None, all_salts=True) >= n_pages
    assert engine.report().free_pages == engine.report().pages
    assert [ask(engine, prompt(1, 22), salt) for salt in (None, "a", "b")] == [0, 0, 0]


def test_eviction_reaches_every_adapter_set_of_a_tenant() -> None:
    engine = toy_engine()
    for lora in ([], [("x", 1.0)]):
        sequence = engine.prepare(GenerationRequest(prompt(1, 22), GREEDY, cache_salt="a"))
        sequence.cache_root = engine.cache_root("a", lora)
        run(engine, sequence)
    n_pages = engine.report().cached_pages
    assert engine.evict(None, cache_salt="a") == n_pages == 12


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_tells_tenants_and_pins_apart() -> None:
    engine = toy_engine()
    ask(engine, prompt(1, 22))
    ask(engine, prompt(1, 22), "a")
    ask(engine, prompt(1, 22), "a")
    pin(engine, prompt(30, 9))
    report = engine.report(per_salt=True)
    by_salt = {one.cache_salt: one for one in report.salts}
    assert (by_salt["a"].prompt_tokens, by_salt["a"].cached_tokens) == (44, 21)
    assert (by_salt[None].prompt_tokens, by_salt[None].cached_tokens) == (31, 0)
    assert sum(one.pages for one in report.salts) == report.cached_pages + report.pinned_pages
    assert [(one.tokens, one.pages, one.expires_in_s) for one in report.pins] == [(9, 3, None)]
    assert engine.report().salts == ()


def test_seconds_saved_follow_from_the_measured_rate() -> None:
    engine = toy_engine(max_batched_tokens=128, n_pages=128)
    assert engine.report().prefill_saved_s is None
    ask(engine, prompt(1, 200))
    ask(engine, prompt(1, 200))
    report = engine.report()
    assert report.prefill_tokens_per_s is not None
    assert report.prefill_saved_s == pytest.approx(199 / report.prefill_tokens_per_s)
    assert report.hit_rate == pytest.approx(199 / 400)


def test_the_rate_counts_steps_that_are_mostly_prefill() -> None:
    rate = PrefillRate()
    rate.note(63, 0, 100.0)  # too short
    rate.note(100, 30, 100.0)  # too many decodes
    rate.note(0, 4, 100.0)
    assert rate.tokens_per_s is None
    rate.note(128, 2, 1.0)
    rate.note(20, 0, 0.5)  # goes on
    rate.note(0, 1, 100.0)
    rate.note(20, 0, 100.0)
    assert rate.tokens_per_s == pytest.approx(100.0)


def test_tenants_that_have_not_been_used_for_long_are_forgotten() -> None:
    tenants = Tenants(lambda salt, lora: f"{salt} {lora}".encode())
    for number in range(MAX_ROOTS):
        tenants.root(str(number))
    first = tenants.root("0")
    tenants.root("one more")
    tenants.note(first, 10, 5)
    tenants.note(b"nobody's", 10, 5)
    tenants.note(None, 10, 5)
    reports = {one.cache_salt: one for one in tenants.reports({first: 3})}
    assert len(reports) == MAX_ROOTS
    assert "1" not in reports
    assert (reports["0"].pages, reports["0"].prompt_tokens, reports["0"].cached_tokens) == (3, 10, 5)


# --- through ExL2LLM -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def llm(directory: Path) -> Iterator[ExL2LLM]:
    with ExL2LLM(directory, cache_tokens=640, page_size=16, max_batch_size=2) as one:
        yield one


def test_a_pin_says_whether_it_is_active(llm: ExL2LLM) -> None:
    with llm.pin("p" * 49, ttl_s=60) as kept:
        assert kept.is_active
        assert "is_active=True" in repr(kept)
        kept.renew(30)
        assert 29 < (llm.cache_report().pins[0].expires_in_s or 0) <= 30
    assert not kept.is_active
    with pytest.raises(RequestError, match="the pin is over"):
        kept.renew()
    short = llm.pin("q" * 20, ttl_s=0.01)
    time.sleep(0.02)
    assert not short.is_active
    assert llm.cache_report().pinned_pages == 0
    late = llm.pin("late")
    llm.close()
    assert not late.is_active
    late.release()
    with pytest.raises(EngineClosedError):
        late.renew()


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), "60", True])
def test_a_time_to_live_that_is_none_is_refused(llm: ExL2LLM, ttl_s: float) -> None:
    with pytest.raises(RequestError, match="ttl_s must be a number of seconds"):
        llm.pin("p", ttl_s=ttl_s)


def test_a_pin_that_is_refused_says_what_to_do(llm: ExL2LLM) -> None:
    with pytest.raises(PinLimitError, match="release a pin"):
        llm.pin("p" * 500)
    assert llm.cache_report().pinned_pages == 0


def test_an_interrupt_after_the_pages_were_kept_lets_them_go(llm: ExL2LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = ExL2LLM._compute

    def interrupted(self: ExL2LLM, sequence: Sequence) -> None:
        compute(self, sequence)
        raise KeyboardInterrupt

    monkeypatch.setattr(ExL2LLM, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.pin("p" * 49)
    assert llm.cache_report().pinned_pages == 0


def test_eviction_takes_texts_chats_and_tenants(llm: ExL2LLM) -> None:
    chat = [{"role": "user", "content": "a question of some length"}]
    llm.chat(chat, GREEDY)
    llm.generate("x" * 40, GREEDY, cache_salt="a")
    assert llm.evict("y" * 40) == 0
    assert llm.evict(chat) > 0
    assert llm.evict("x" * 40) == 0
    assert llm.evict("x" * 40, cache_salt="a") == 3
    llm.generate("x" * 40, GREEDY, cache_salt="a")
    assert llm.evict(everything=True) == 3
    assert llm.evict(everything=True) == 0


def test_eviction_refuses_what_makes_no_sense(llm: ExL2LLM) -> None:
    with pytest.raises(RequestError, match="either a prompt or a cache_salt"):
        llm.evict("x", everything=True)
    with pytest.raises(RequestError, match="either a prompt or a cache_salt"):
        llm.evict(cache_salt="a", everything=True)
    with pytest.raises(RequestError, match="at least one token"):
        llm.evict([])
    with pytest.raises(RequestError, match="cache_salt must be a text"):
        llm.evict(cache_salt="")


def test_eviction_beside_running_requests_changes_no_answer(llm: ExL2LLM) -> None:
    sampling = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    expected = llm.generate("abcdefgh" * 10, sampling).token_ids
    results: list[tuple[int, ...]] = []
    thread = threading.Thread(target=lambda: results.append(llm.generate("abcdefgh" * 10, sampling).token_ids))
    thread.start()
    while thread.is_alive():
        llm.evict(everything=True)
        llm._thread.call(llm._engine.check_integrity)
    assert results == [expected]

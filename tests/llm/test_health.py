"""Health is told by anyone, at any time, also when a step never comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from exl2_rag.errors import EngineClosedError
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.engine_thread import EngineThread
from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kv_cache import KVCache
from tests.llm.test_engine_thread import Fatal, SlowModel, request, wait_until
from tests.support.toy_model import toy_engine


@pytest.fixture
def model() -> SlowModel:
    return SlowModel()


@pytest.fixture
def engine(model: SlowModel) -> Engine:
    return toy_engine(model, max_batch_size=2)


@pytest.fixture
def thread(engine: Engine, model: SlowModel) -> Iterator[EngineThread]:
    one = EngineThread(engine)
    yield one
    model.may_run.set()
    one.close()


def test_an_engine_without_work_is_idle_however_long(thread: EngineThread) -> None:
    time.sleep(0.05)
    health = thread.health(0.01)
    assert (health.status, health.is_healthy) == ("idle", True)
    assert (health.quiet_s, health.steps, health.step_s, health.last_step_s) == (0, 0, None, None)
    assert health.new_tokens_per_s == 0


def test_a_step_that_never_ends_is_told_without_waiting_for_it(
    engine: Engine, thread: EngineThread, model: SlowModel
) -> None:
    streams = [thread.stream(request(engine, [n], 200)) for n in range(3)]
    threads = [threading.Thread(target=next, args=(stream,)) for stream in streams]
    for one in threads:
        one.start()
    wait_until(lambda: thread.health(60).waiting_requests == 1 and thread.health(60).steps > 2)
    model.may_run.clear()
    wait_until(lambda: (thread.health(0.05).step_s or 0) > 0.1)
    began = time.monotonic()
    health = thread.health(0.05)
    assert time.monotonic() - began < 0.05
    assert (health.status, health.is_healthy) == ("stuck", False)
    assert (health.running_requests, health.waiting_requests) == (2, 1)
    assert health.step_s is not None
    assert health.quiet_s >= 0.05
    assert thread.health(600).status == "busy"
    model.may_run.set()
    wait_until(lambda: thread.health(0.5).status == "busy")
    for stream in streams[:2]:
        stream.close()
    for one in threads:
        one.join()
    streams[2].close()
    wait_until(lambda: thread.health(60).status == "idle")


def test_rates_and_step_times_are_those_of_the_work_done(engine: Engine, thread: EngineThread) -> None:
    began = time.monotonic()
    n_pieces = len(list(thread.stream(request(engine, [1] * 30, 50))))
    seconds = time.monotonic() - began
    health = thread.health(60)
    assert n_pieces == 50
    assert health.steps == 50
    assert health.last_step_s is not None
    assert health.last_step_s >= 0.002
    assert health.new_tokens_per_s == pytest.approx(50 / seconds, rel=0.5)
    assert health.computed_tokens_per_s > health.new_tokens_per_s


def test_a_command_that_is_not_taken_up_counts_as_work(engine: Engine, thread: EngineThread) -> None:
    may_go_on = threading.Event()
    blocked = threading.Thread(target=thread.call, args=(lambda: may_go_on.wait(60),))
    blocked.start()
    time.sleep(0.02)
    stream = thread.stream(request(engine, [1], 2))
    asker = threading.Thread(target=next, args=(stream,))
    asker.start()
    wait_until(lambda: thread.health(0.05).status == "stuck")
    may_go_on.set()
    blocked.join()
    asker.join()
    stream.close()


def test_a_closed_engine_says_closed(thread: EngineThread) -> None:
    thread.close()
    assert thread.health(60).status == "closed"
    assert not thread.health(60).is_healthy


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_says_what_ended_it(engine: Engine, thread: EngineThread, model: SlowModel) -> None:
    def die(inputs: ForwardInputs, cache: KVCache) -> None:
        raise Fatal("no way")

    model.forward = die  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineClosedError):
        list(thread.stream(request(engine, [1], 5)))
    thread._thread.join()
    health = thread.health(60)
    assert health.status == "dead"
    assert health.reason == "the engine's thread ended: Fatal: no way"

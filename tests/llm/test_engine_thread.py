from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from exl2_rag.errors import EngineClosedError, EngineError
from exl2_rag.llm.engine import Engine, Update
from exl2_rag.llm.engine_thread import EngineThread
from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.request import GenerationRequest, SamplingParams, StreamPiece
from exl2_rag.llm.sequence import Sequence
from tests.support.toy_model import ToyModel, expected_tokens, toy_engine


class SlowModel(ToyModel):
    """Takes a while for each step, and can be held up."""

    def __init__(self, step_s: float = 0.002) -> None:
        super().__init__()
        self.step_s = step_s
        self.may_run = threading.Event()
        self.may_run.set()

    def forward(self, inputs: ForwardInputs, cache: KVCache):
        assert self.may_run.wait(60)
        time.sleep(self.step_s)
        return super().forward(inputs, cache)


@pytest.fixture
def model() -> SlowModel:
    return SlowModel()


@pytest.fixture
def engine(model: SlowModel) -> Engine:
    return toy_engine(model)


@pytest.fixture
def thread(engine: Engine) -> Iterator[EngineThread]:
    one = EngineThread(engine)
    yield one
    one.close()


def request(engine: Engine, token_ids: list[int], n_new: int = 12) -> Sequence:
    sampling = SamplingParams(max_tokens=n_new, temperature=0, ignore_eos=True)
    return engine.prepare(GenerationRequest(tuple(token_ids), sampling))


def tokens_of(pieces: list[StreamPiece]) -> list[int]:
    return [token_id for piece in pieces for token_id in piece.token_ids]


def wait_until(holds, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


def test_a_stream_gives_the_pieces_of_its_request(engine: Engine, thread: EngineThread) -> None:
    pieces = list(thread.stream(request(engine, [1, 2, 3])))
    assert tokens_of(pieces) == expected_tokens([1, 2, 3], 12)
    assert thread.active_requests == 0


def test_many_threads_share_the_engine(engine: Engine, thread: EngineThread) -> None:
    def ask(n: int) -> bool:
        prompt = [n % 5 + 1, *range(n % 7), 3]
        return tokens_of(list(thread.stream(request(engine, prompt)))) == expected_tokens(prompt, 12)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(40)))
    assert thread.active_requests == 0


def test_closing_a_stream_cancels_its_request_within_a_token_or_two(
    engine: Engine, thread: EngineThread, model: SlowModel
) -> None:
    stream = thread.stream(request(engine, [1, 2, 3], 200))
    next(stream)
    assert thread.active_requests == 1
    stream.close()
    assert thread.active_requests == 0
    steps = model.n_steps
    wait_until(lambda: thread.call(engine.report).running_pages == 0)
    time.sleep(0.05)
    assert model.n_steps <= steps + 3


def test_dropping_a_stream_cancels_its_request(engine: Engine, thread: EngineThread) -> None:
    stream = thread.stream(request(engine, [1, 2, 3], 200))
    next(stream)
    del stream
    wait_until(lambda: not engine.has_work)


def test_a_stream_that_is_never_started_runs_nothing(engine: Engine, thread: EngineThread, model: SlowModel) -> None:
    thread.stream(request(engine, [1, 2, 3])).close()
    time.sleep(0.02)
    assert model.n_steps == 0


def test_a_queued_request_can_be_cancelled_and_never_runs(model: SlowModel) -> None:
    engine = toy_engine(model, max_batch_size=1)
    thread = EngineThread(engine)
    first = thread.stream(request(engine, [1], 200))
    next(first)
    updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
    ticket = thread.submit(request(engine, [2] * 30, 5), updates.put)
    assert thread.call(engine.report).waiting_requests == 1
    assert thread.active_requests == 1
    ticket.cancel()
    ticket.cancel()
    assert thread.call(engine.report).waiting_requests == 0
    first.close()
    wait_until(lambda: not engine.has_work)
    assert updates.empty()
    thread.close()


def test_the_thread_sleeps_when_there_is_nothing_to_do(engine: Engine, thread: EngineThread) -> None:
    list(thread.stream(request(engine, [1, 2, 3])))
    before = time.thread_time_ns(), time.process_time_ns()
    time.sleep(0.3)
    assert (time.process_time_ns() - before[1]) / 1e9 < 0.1


def test_a_failing_step_is_told_to_every_caller_and_the_engine_goes_on(
    engine: Engine, thread: EngineThread, model: SlowModel
) -> None:
    streams = [thread.stream(request(engine, [n, 2, 3], 100)) for n in range(3)]
    for stream in streams:
        next(stream)
    model.fail_next = MemoryError("no room")
    errors = []
    for stream in streams:
        with pytest.raises(EngineError, match=r"step of the engine failed.*MemoryError: no room") as caught:
            list(stream)
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 3
    assert all(isinstance(error.__cause__, MemoryError) for error in errors)
    assert thread.active_requests == 0
    assert tokens_of(list(thread.stream(request(engine, [4])))) == expected_tokens([4], 12)


def test_closing_fails_what_is_outstanding_and_what_comes_after(
    engine: Engine, thread: EngineThread, model: SlowModel
) -> None:
    stream = thread.stream(request(engine, [1, 2], 200))
    next(stream)
    thread.close()
    with pytest.raises(EngineClosedError, match="closed, while this request was in progress"):
        list(stream)
    with pytest.raises(EngineClosedError, match="was closed"):
        next(thread.stream(request(engine, [1])))
    with pytest.raises(EngineClosedError):
        thread.call(engine.report)
    assert thread.is_closed
    assert thread.active_requests == 0
    thread.close()
    assert not any(one.name == "exl2-rag engine" and one is thread._thread for one in threading.enumerate())


def test_closing_while_a_command_waits_fails_the_command(model: SlowModel) -> None:
    engine = toy_engine(model)
    thread = EngineThread(engine)
    stream = thread.stream(request(engine, [1], 200))
    next(stream)
    model.may_run.clear()
    time.sleep(0.02)  # the thread now stands in a step
    updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
    thread.submit(request(engine, [2]), updates.put)
    closer = threading.Thread(target=thread.close)
    closer.start()
    wait_until(lambda: thread.is_closed)
    model.may_run.set()
    closer.join()
    assert isinstance(updates.get(timeout=60).error, EngineClosedError)


class Fatal(BaseException):
    """Not an Exception: nothing in the thread expects it."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_even_a_dying_thread_leaves_nobody_hanging(engine: Engine, thread: EngineThread, model: SlowModel) -> None:
    stream = thread.stream(request(engine, [1], 200))
    next(stream)

    def die(inputs: ForwardInputs, cache: KVCache) -> None:
        raise Fatal

    model.forward = die  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineClosedError, match="thread ended: Fatal"):
        list(stream)
    thread._thread.join()


def test_the_result_of_a_call_comes_back_and_so_does_its_error(engine: Engine, thread: EngineThread) -> None:
    assert thread.call(lambda: threading.current_thread().name) == "exl2-rag engine"
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)


def test_requests_run_together_and_one_failure_cancels_the_others(
    engine: Engine, thread: EngineThread, model: SlowModel
) -> None:
    results = thread.run_together([request(engine, [n]) for n in range(1, 5)])
    assert [tokens_of(pieces) for pieces in results] == [expected_tokens([n], 12) for n in range(1, 5)]
    model.nan_after = expected_tokens([1], 1)[0]
    with pytest.raises(EngineError, match="nan"):
        thread.run_together([request(engine, [1], 200), request(engine, [2], 200)])
    wait_until(lambda: not engine.has_work)


# --- async -----------------------------------------------------------------------------------------------------------


async def collect(engine: Engine, thread: EngineThread, prompt: list[int], n_new: int = 12) -> list[int]:
    return tokens_of([piece async for piece in thread.astream(request(engine, prompt, n_new))])


def test_one_engine_serves_several_event_loops_one_after_another(engine: Engine, thread: EngineThread) -> None:
    for n in range(3):
        assert asyncio.run(collect(engine, thread, [n])) == expected_tokens([n], 12)


def test_one_engine_serves_several_event_loops_at_once(engine: Engine, thread: EngineThread) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: asyncio.run(collect(engine, thread, [n])), range(8)))
    assert found == [expected_tokens([n], 12) for n in range(8)]


async def test_the_loop_goes_on_while_the_engine_works(engine: Engine, thread: EngineThread) -> None:
    n_ticks = 0

    async def tick() -> None:
        nonlocal n_ticks
        while True:
            await asyncio.sleep(0.001)
            n_ticks += 1

    ticking = asyncio.create_task(tick())
    found = await asyncio.gather(*[collect(engine, thread, [n], 30) for n in range(4)])
    ticking.cancel()
    assert found == [expected_tokens([n], 30) for n in range(4)]
    assert n_ticks > 10


async def test_the_sync_face_works_inside_a_running_loop(engine: Engine, thread: EngineThread) -> None:
    assert tokens_of(list(thread.stream(request(engine, [3])))) == expected_tokens([3], 12)


async def test_cancelling_a_task_cancels_its_request(engine: Engine, thread: EngineThread) -> None:
    task = asyncio.create_task(collect(engine, thread, [1], 250))
    while not thread.active_requests:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert thread.active_requests == 0
    wait_until(lambda: not engine.has_work)


async def test_leaving_a_stream_early_cancels_its_request(engine: Engine, thread: EngineThread) -> None:
    stream = thread.astream(request(engine, [1], 250))
    async for _ in stream:
        break
    await stream.aclose()
    assert thread.active_requests == 0
    wait_until(lambda: not engine.has_work)


async def test_an_async_stream_tells_its_errors(engine: Engine, thread: EngineThread, model: SlowModel) -> None:
    model.fail_next = MemoryError("no room")
    with pytest.raises(EngineError, match="no room"):
        await collect(engine, thread, [1])


def test_a_loop_closed_under_a_request_cancels_it(engine: Engine, thread: EngineThread) -> None:
    loop = asyncio.new_event_loop()
    stream = thread.astream(request(engine, [1], 250))
    loop.run_until_complete(anext(stream))
    loop.close()
    wait_until(lambda: not engine.has_work)
    with pytest.raises(StopIteration):
        stream.aclose().send(None)

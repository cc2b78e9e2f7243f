"""One thread drives the engine; any number of threads and event loops use it. Knows nothing of models or text.

Callers put commands into an inbox; the thread carries them out between steps and sleeps when there is nothing to do.
News of a request go to its listener, which the thread calls. The async face is the sync one with another listener, so
it belongs to no event loop: whichever loop runs the coroutine is the one that is told.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from exl2_rag.errors import EngineClosedError, EngineError, Exl2RagError
from exl2_rag.llm.engine import Engine, Update, as_engine_error
from exl2_rag.llm.health import EngineHealth, Status, StepMonitor
from exl2_rag.llm.request import StreamPiece
from exl2_rag.llm.sequence import Sequence, State

ResultT = TypeVar("ResultT")
Listener = Callable[[Update], None]


@dataclass(frozen=True, slots=True)
class _Command:
    """Something for the thread to do: `run` between two steps, or `fail` if the engine is closed before."""

    run: Callable[[], None]
    fail: Callable[[Exl2RagError], None]


class Ticket:
    """A submitted request, as its caller holds it: one sequence, or several that continue one prompt."""

    def __init__(self, owner: EngineThread, sequence: Sequence, listener: Listener) -> None:
        self.sequences = (sequence, *sequence.branches)
        self.listener = listener
        self.n_unfinished = len(self.sequences)  # written by the engine's thread
        self.has_ended = False  # written by the engine's thread
        self.is_cancelled = False  # written by the caller's
        self._owner = owner

    def cancel(self) -> None:
        """Stop the request between two steps, also while it is queued. Harmless when it has ended."""
        if not self.has_ended and not self.is_cancelled:
            self.is_cancelled = True
            self._owner.abort(self)

    @property
    def holds_slot(self) -> bool:
        """Whether it is running now."""
        is_running = any(one.state is State.RUNNING for one in self.sequences)
        return is_running and not self.is_cancelled and not self.has_ended


class EngineThread:
    """Owns the engine from now on; nobody else may call it, `prepare` and `prepare_prompt` excepted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._condition = threading.Condition()
        self._inbox: deque[_Command] = deque()
        self._inbox_since = 0.0  # when the first of the commands that are in it came
        self._is_closing = False
        self._ended_by: str | None = None
        self._monitor = StepMonitor()
        self._tickets: dict[Sequence, Ticket] = {}
        engine.on_room(self._wake)
        self._thread = threading.Thread(target=self._run, name="exl2-rag engine", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closing

    @property
    def active_requests(self) -> int:
        """Requests that run now. One that has finished, failed or been cancelled is not among them."""
        return sum(ticket.holds_slot for ticket in set(self._tickets.values()))

    def health(self, stuck_after_s: float) -> EngineHealth:
        """How the engine is, whatever its thread is doing; waits for nothing."""
        now = time.monotonic()
        monitor, began = self._monitor, self._monitor.began
        running, waiting = self._engine.queue_lengths
        last_sign = max(monitor.last_sign, self._inbox_since if self._inbox else 0.0)
        has_work = began is not None or bool(self._inbox) or running + waiting > 0
        quiet_s = max(0.0, now - last_sign) if has_work else 0.0
        status: Status = "busy" if has_work else "idle"
        if self._ended_by is not None:
            status = "dead"
        elif self._is_closing:
            status = "closed"
        elif quiet_s >= stuck_after_s:
            status = "stuck"
        new_tokens_per_s, computed_tokens_per_s = monitor.rates(now)
        return EngineHealth(
            status=status,
            running_requests=running,
            waiting_requests=waiting,
            step_s=None if began is None else now - began,
            last_step_s=monitor.last_step_s,
            quiet_s=quiet_s,
            steps=monitor.n_steps,
            new_tokens_per_s=new_tokens_per_s,
            computed_tokens_per_s=computed_tokens_per_s,
            reason=self._ended_by,
        )

    def submit(self, sequence: Sequence, listener: Listener) -> Ticket:
        """Queue a prepared sequence, with its branches.

        Args:
            listener: called with each update, from the engine's thread or from this one; must be quick and not raise.
                Each sequence has a last update, unless there is an error, which ends all of the request.

        Raises:
            EngineClosedError: the engine is closed.
        """
        ticket = Ticket(self, sequence, listener)

        def start() -> None:
            if ticket.is_cancelled:
                return
            self._tickets.update(dict.fromkeys(ticket.sequences, ticket))
            try:
                self._engine.add(sequence)
            except Exception as error:
                self._deliver(Update(sequence, error=as_engine_error(error, "this request failed")))

        self._put(_Command(start, lambda error: listener(Update(sequence, error=error))))
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """Cancel a request; it gets no further news."""

        def stop() -> None:
            self._drop(ticket)

        try:
            self._put(_Command(stop, lambda _error: None))
        except EngineClosedError:
            return  # nothing runs any more

    def call(self, action: Callable[[], ResultT]) -> ResultT:
        """Have `action` run between two steps and return its result.

        Raises:
            EngineClosedError: the engine is closed.
            Exception: what the action raises.
        """
        future: Future[ResultT] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

        self._put(_Command(run, future.set_exception))
        return future.result()

    def stream(self, sequence: Sequence) -> Generator[StreamPiece, None, None]:
        """The pieces of a prepared sequence, which is submitted when the first one is asked for.

        Closing the generator cancels the request.

        Raises:
            EngineClosedError: the engine is closed, now or while it runs.
            Exl2RagError: what ended the request.
        """
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        ticket = self.submit(sequence, updates.put)
        n_running = len(ticket.sequences)
        try:
            while n_running:
                update = updates.get()
                if update.error is not None:
                    raise update.error
                if update.piece is not None:
                    yield update.piece
                n_running -= update.is_last
        finally:
            ticket.cancel()

    def run_together(self, sequences: Iterable[Sequence]) -> list[list[StreamPiece]]:
        """Submit prepared sequences at once and wait for all; if one fails, the others are cancelled.

        Raises:
            EngineClosedError, Exl2RagError: as for `stream`.
        """
        pieces: dict[Sequence, list[StreamPiece]] = {sequence: [] for sequence in sequences}
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        tickets: list[Ticket] = []
        owners: dict[Sequence, Sequence] = {}
        try:
            for sequence in pieces:
                owners.update(dict.fromkeys((sequence, *sequence.branches), sequence))
                tickets.append(self.submit(sequence, updates.put))
            n_running = len(owners)
            while n_running:
                update = updates.get()
                if update.error is not None:
                    raise update.error
                if update.piece is not None:
                    pieces[owners[update.sequence]].append(update.piece)
                n_running -= update.is_last
        finally:
            for ticket in tickets:
                ticket.cancel()
        return list(pieces.values())

    async def astream(self, sequence: Sequence) -> AsyncGenerator[StreamPiece, None]:
        """`stream` for a coroutine: closing the generator or cancelling its task cancels the request."""
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[Update] = asyncio.Queue()

        def tell(update: Update) -> None:
            try:
                loop.call_soon_threadsafe(updates.put_nowait, update)
            except RuntimeError:  # the loop was closed under the request; nobody waits for it any more
                ticket.cancel()

        ticket = self.submit(sequence, tell)
        n_running = len(ticket.sequences)
        try:
            while n_running and not ticket.is_cancelled:
                update = await updates.get()
                if update.error is not None:
                    raise update.error
                if update.piece is not None:
                    yield update.piece
                n_running -= update.is_last
        finally:
            ticket.cancel()

    def close(self) -> None:
        """End the thread. Requests that have not finished fail with EngineClosedError. May be called again."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _put(self, command: _Command) -> None:
        with self._condition:
            if self._is_closing:
                raise EngineClosedError("this engine was closed; make a new ExL2LLM")
            if not self._inbox:
                self._inbox_since = time.monotonic()
            self._inbox.append(command)
            self._condition.notify()

    def _wake(self) -> None:
        """There may be work that came neither with a command nor from a step."""
        with self._condition:
            self._condition.notify()

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            self._work()
        except BaseException as error:
            reason = self._ended_by = f"the engine's thread ended: {type(error).__name__}: {error}"
            raise
        finally:
            with self._condition:
                self._is_closing = True
                commands, self._inbox = list(self._inbox), deque()
            for command in commands:
                command.fail(EngineClosedError(f"{reason}, before this could be done"))
            self._fail_all(lambda: EngineClosedError(f"{reason}, while this request was in progress"))
            self._engine.close()
            self._engine.reset()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not (self._inbox or self._is_closing or self._engine.has_work):
                    self._condition.wait()
                if self._is_closing:
                    return
                commands, self._inbox = list(self._inbox), deque()
            self._monitor.sign()
            for command in commands:
                command.run()
            if self._engine.has_work:
                self._step()

    def _step(self) -> None:
        self._monitor.begin()
        try:
            updates = self._engine.step()
        except Exception as error:
            self._monitor.end(0, 0)
            cause = error
            self._fail_all(lambda: _step_error(cause))
            self._engine.reset()
            return
        new_tokens = sum(len(update.piece.token_ids) for update in updates if update.piece is not None)
        self._monitor.end(new_tokens, self._engine.n_computed_last)
        for update in updates:
            self._deliver(update)

    def _deliver(self, update: Update) -> None:
        ticket = self._tickets.get(update.sequence)
        if ticket is None:
            return
        if update.is_last:
            del self._tickets[update.sequence]
            ticket.n_unfinished -= 1
            ticket.has_ended = ticket.n_unfinished == 0 or update.error is not None
        if update.error is not None:
            self._drop(ticket)
        ticket.listener(update)

    def _drop(self, ticket: Ticket) -> None:
        """Cancel what is left of a request; it gets no further news."""
        for sequence in ticket.sequences:
            if self._tickets.pop(sequence, None) is not None:
                self._engine.abort(sequence)

    def _fail_all(self, make_error: Callable[[], Exl2RagError]) -> None:
        """Tell every caller; the engine is not touched, since what it holds may be broken."""
        tickets = set(self._tickets.values())
        self._tickets.clear()
        for ticket in tickets:
            ticket.has_ended = True
            ticket.listener(Update(ticket.sequences[0], error=make_error()))


def _step_error(cause: Exception) -> EngineError:
    error = EngineError(f"a step of the engine failed, and with it every request: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error

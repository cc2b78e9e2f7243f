"""A hold on cached pages, as the caller has it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from exl2_rag.llm.engine import Engine
from exl2_rag.llm.engine_thread import EngineThread
from exl2_rag.llm.sequence import Sequence


class Pin:
    """Pages that stay in the cache until `release`. Also a context manager.

    Attributes:
        n_tokens: length of the pinned prompt.
    """

    def __init__(self, thread: EngineThread, engine: Engine, sequence: Sequence) -> None:
        self._thread = thread
        self._engine = engine
        self._sequence = sequence
        self.n_tokens = sequence.n_prompt

    def release(self) -> None:
        """Let the pages go; they stay cached as long as there is room. Harmless when done before, or after close()."""
        if not self._thread.is_closed:
            self._thread.call(lambda: self._engine.unpin(self._sequence))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

"""A hold on cached pages, as the caller has it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from exl2_rag.errors import EngineClosedError, RequestError
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.engine_thread import EngineThread
from exl2_rag.llm.sequence import Sequence


class Pin:
    """Pages that stay in the cache until `release`, or until their time to live is over. Also a context manager.

    Attributes:
        n_tokens: length of the pinned prompt.
    """

    def __init__(self, thread: EngineThread, engine: Engine, sequence: Sequence) -> None:
        self._thread = thread
        self._engine = engine
        self._sequence = sequence
        self.n_tokens = sequence.n_prompt

    @property
    def is_active(self) -> bool:
        """Whether the pages are kept at this moment: not released, not expired, the engine open and its cache whole."""
        return not self._thread.is_closed and self._engine.is_pinned(self._sequence)

    def renew(self, ttl_s: float | None = None) -> None:
        """Begin another time to live from now on; None: until `release`.

        Raises:
            RequestError: `ttl_s` is no positive number of seconds, or the pin is over; pin the prompt again.
            EngineClosedError: the engine is closed.
        """
        check_ttl(ttl_s)
        if not self._thread.call(lambda: self._engine.renew_pin(self._sequence, ttl_s)):
            raise RequestError("the pin is over, so its pages may be gone; pin the prompt again")

    def release(self) -> None:
        """Let the pages go; they stay cached as long as there is room. Harmless when done before, or after close()."""
        try:
            self._thread.call(lambda: self._engine.unpin(self._sequence))
        except EngineClosedError:
            return  # and with it the cache

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Pin(n_tokens={self.n_tokens}, is_active={self.is_active})"


def check_ttl(ttl_s: object) -> None:
    """Refuse what is no time to live.

    Raises:
        RequestError: it is neither None nor a positive, finite number of seconds.
    """
    is_number = isinstance(ttl_s, int | float) and not isinstance(ttl_s, bool)
    if ttl_s is not None and not (is_number and 0 < ttl_s < float("inf")):  # type: ignore[operator]
        raise RequestError(f"ttl_s must be a number of seconds above 0, or None to keep the pages, got {ttl_s!r:.80}")

"""Whether the engine gets on. The engine's thread writes, anyone reads, and nobody waits for the other.

Each value is written by one thread and read whole, so no lock is needed: a native call that never comes back keeps
nobody from being told so.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

RATE_WINDOW_S = 10.0
"""Rates are of the last so many seconds."""

DEFAULT_STUCK_AFTER_S = 60.0

Status = Literal["idle", "busy", "stuck", "closed", "dead"]


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """How the engine is at one moment.

    Attributes:
        status: "idle" (nothing to do), "busy" (working), "stuck" (there is work, but for `stuck_after_s` seconds no
            step has ended), "closed" (by `close`), or "dead" (its thread ended by an error).
        running_requests, waiting_requests: sequences in the batch, and those that wait for a place in it. A request for
            several continuations counts as several.
        step_s: seconds since the step in progress began; None between steps.
        last_step_s: seconds that the last whole step took; None before the first.
        quiet_s: seconds since the engine last got on with its work; 0 when it is idle.
        steps: steps taken so far.
        new_tokens_per_s, computed_tokens_per_s: of the last ten seconds; the latter counts prompts too.
        reason: what ended a dead engine.
    """

    status: Status
    running_requests: int
    waiting_requests: int
    step_s: float | None
    last_step_s: float | None
    quiet_s: float
    steps: int
    new_tokens_per_s: float
    computed_tokens_per_s: float
    reason: str | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether requests are, or would be, worked on."""
        return self.status in ("idle", "busy")


@dataclass(frozen=True, slots=True)
class _Step:
    ended: float
    new_tokens: int
    computed_tokens: int


class StepMonitor:
    """Notes when steps begin and end. Written by the engine's thread alone; times are of `time.monotonic`."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.last_step_s: float | None = None
        self.last_sign = time.monotonic()
        self.n_steps = 0
        self._steps: deque[_Step] = deque()

    def begin(self) -> None:
        """A step begins."""
        self.began = self.last_sign = time.monotonic()

    def end(self, new_tokens: int, computed_tokens: int) -> None:
        """It has ended, well or not."""
        now = self.last_sign = time.monotonic()
        if self.began is not None:
            self.last_step_s = now - self.began
        self.began = None
        self.n_steps += 1
        self._steps.append(_Step(now, new_tokens, computed_tokens))
        while self._steps[0].ended < now - RATE_WINDOW_S:
            self._steps.popleft()

    def sign(self) -> None:
        """The thread is alive."""
        self.last_sign = time.monotonic()

    def rates(self, now: float) -> tuple[float, float]:
        """New and computed tokens a second; 0 where nothing was done lately."""
        recent = [one for one in tuple(self._steps) if one.ended >= now - RATE_WINDOW_S]
        if not recent:
            return 0.0, 0.0
        seconds = max(now - recent[0].ended, self.last_step_s or 0.0, 1e-3)
        return sum(one.new_tokens for one in recent) / seconds, sum(one.computed_tokens for one in recent) / seconds

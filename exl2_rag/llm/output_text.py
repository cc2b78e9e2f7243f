"""The text of a continuation as it comes: whole characters, and never any part of a stop string.

Knows no tensors and no vocabulary; turning ids into characters is the decoder's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class TokenDecoder(Protocol):
    """Turns token ids into text one at a time; `exl2_rag.llm.tokenizer.IncrementalDecoder` is one."""

    def push(self, token_id: int) -> str:
        """The characters that this token completes; empty while a character is still incomplete."""
        ...

    def flush(self) -> str:
        """What is left of an incomplete character at the end."""
        ...

    def state(self) -> object:
        """Where it is, for `restore`."""
        ...

    def restore(self, state: object) -> None:
        """Go back to where it was when `state` was asked for."""
        ...


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where a token's text begins, counted in characters from the start, and the decoder's state before it."""

    start: int
    state: object


class OutputText:
    """Collects the text of one continuation and holds back what could still become a stop string.

    Args:
        decoder: a fresh decoder.
        stop: strings that end the text; none is empty.
    """

    def __init__(self, decoder: TokenDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._pending = ""  # decoded, but not handed out yet
        self._releasable = 0  # leading characters of it that can be part of no stop string
        self._n_taken = 0  # characters handed out
        self._n_exempt = 0  # characters, from the start, in which a whole stop string does not count
        self._marks: deque[_Mark] = deque()  # of the tokens of which nothing has been handed out
        self.n_tokens_taken = 0  # tokens of whose text some has been handed out, and those before them
        self.stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> bool:
        """Add a token; return whether a stop string is complete, after which nothing more is taken.

        With `may_stop` False one that is complete by now is ordinary text; what it begins may still end the text later.
        """
        self._marks.append(_Mark(self._n_taken + len(self._pending), self._decoder.state()))
        return self._append(self._decoder.push(token_id), may_stop=may_stop)

    def take(self) -> str:
        """The text that is safe to hand out since the last call."""
        text, self._pending = self._pending[: self._releasable], self._pending[self._releasable :]
        self._releasable = 0
        self._n_taken += len(text)
        # Once the text has ended nothing can be taken back, for what was held for another stop string is out now.
        while self._marks and (self.stopped or self._marks[0].start < self._n_taken):
            self._marks.popleft()
            self.n_tokens_taken += 1
        return text

    def roll_back(self, n_tokens: int) -> None:
        """Undo the last `n_tokens` calls of `push`, all made since the last `take`.

        What was held back before them may have been handed out because of them, so older ones cannot be undone.
        """
        if not 0 <= n_tokens <= len(self._marks):
            raise ValueError(f"expected from 0 to {len(self._marks)} tokens to take back, got {n_tokens}")
        if n_tokens == 0:
            return
        mark = self._marks[-n_tokens]
        for _ in range(n_tokens):
            self._marks.pop()
        self._decoder.restore(mark.state)
        self._pending = self._pending[: mark.start - self._n_taken]
        self._n_exempt = min(self._n_exempt, mark.start)
        self._releasable = len(self._pending) - self._held_back()
        self.stopped = False

    def finish(self) -> None:
        """No more tokens come: what was held back is text after all."""
        if not self.stopped and not self._append(self._decoder.flush()):
            self._releasable = len(self._pending)

    def _append(self, text: str, *, may_stop: bool = True) -> bool:
        assert not self.stopped, "text after a stop string"
        if not text:
            return False
        self._pending += text
        # The string that begins first ends the text; of two that begin together, the one that is complete first.
        if not may_stop:
            self._n_exempt = self._n_taken + len(self._pending)
        begins = [place for place in map(self._find, self._stop) if place >= 0]
        if begins:
            self._releasable = min(begins)
            self.stopped = True
            return True
        self._releasable = len(self._pending) - self._held_back()
        return False

    def _find(self, stop: str) -> int:
        return self._pending.find(stop, max(0, self._n_exempt - self._n_taken - len(stop) + 1))

    def _held_back(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        return max((_overlap(self._pending, stop) for stop in self._stop), default=0)


def _overlap(text: str, stop: str) -> int:
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

"""The text of a continuation as it comes: whole characters, and never any part of a stop string.

Knows no tensors and no vocabulary; turning ids into characters is the decoder's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """Turns token ids into text one at a time; `exl2_rag.llm.tokenizer.IncrementalDecoder` is one."""

    def push(self, token_id: int) -> str:
        """The characters that this token completes; empty while a character is still incomplete."""
        ...

    def flush(self) -> str:
        """What is left of an incomplete character at the end."""
        ...


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
        self.stopped = False

    def push(self, token_id: int) -> bool:
        """Add a token; return whether a stop string is complete, after which nothing more is taken."""
        return self._append(self._decoder.push(token_id))

    def take(self) -> str:
        """The text that is safe to hand out since the last call."""
        text, self._pending = self._pending[: self._releasable], self._pending[self._releasable :]
        self._releasable = 0
        return text

    def finish(self) -> None:
        """No more tokens come: what was held back is text after all."""
        if not self.stopped:
            self._append(self._decoder.flush())
        self._releasable = len(self._pending)

    def _append(self, text: str) -> bool:
        assert not self.stopped, "text after a stop string"
        if not text:
            return False
        self._pending += text
        # The string that begins first ends the text; of two that begin together, the one that is complete first.
        begins = [place for place in map(self._pending.find, self._stop) if place >= 0]
        if begins:
            self._pending = self._pending[: min(begins)]
            self._releasable = len(self._pending)
            self.stopped = True
            return True
        self._releasable = len(self._pending) - self._held_back()
        return False

    def _held_back(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        return max((_overlap(self._pending, stop) for stop in self._stop), default=0)


def _overlap(text: str, stop: str) -> int:
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

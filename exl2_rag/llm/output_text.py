"""The text of a continuation as it comes: whole characters, and never any part of a stop string or a banned one.

Knows no tensors and no vocabulary; turning ids into characters is the decoder's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from exl2_rag.llm.banned_strings import BannedStrings, overlap


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
    """Where a token's text begins, counted in characters from the start, and what was the case before it."""

    start: int
    state: object
    n_hidden: int


class OutputText:
    """Collects the text of one continuation and holds back what could still become a stop string or a banned one.

    Args:
        decoder: a fresh decoder.
        stop: strings that end the text; none is empty.
        banned: strings that must not be in it.
        n_hidden: so many characters at the head are no part of the text.
        n_kept_back: hold back so many tokens at least, so that they can be taken back.

    Attributes:
        n_tokens_taken: tokens of whose text some has been handed out, and those before them.
        stopped: a stop string is complete.
        n_banned_tokens: the tokens, counted from the end, in which a banned string that is complete now began; 0 if
            none is. They must be taken back by `roll_back`.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        stop: Sequence[str] = (),
        banned: Sequence[str] = (),
        *,
        n_hidden: int = 0,
        n_kept_back: int = 0,
    ) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._banned = BannedStrings(banned)
        self._n_hidden = n_hidden
        self._n_kept_back = n_kept_back
        self._pending = ""  # decoded, but not handed out yet
        self._releasable = 0  # leading characters of it that can be part of no such string
        self._n_taken = 0  # characters handed out
        self._n_exempt = 0  # characters, from the start, in which a whole stop string does not count
        self._marks: deque[_Mark] = deque()  # of the tokens of which nothing has been handed out
        self.n_tokens_taken = 0
        self.stopped = False
        self.n_banned_tokens = 0

    @property
    def n_tokens_held(self) -> int:
        """Tokens of which nothing has been handed out."""
        return len(self._marks)

    def push(self, token_id: int, *, may_stop: bool = True) -> bool:
        """Add a token; return whether a stop string is complete, after which nothing more is taken.

        With `may_stop` False one that is complete by now is ordinary text; what it begins may still end the text later.
        """
        self._marks.append(_Mark(self._n_taken + len(self._pending), self._decoder.state(), self._n_hidden))
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
        """Undo the last `n_tokens` calls of `push`, all made since the last `take`, or held back for a banned string.

        What was held back for a stop string may have been handed out because of other tokens, which cannot be undone.
        """
        if not 0 <= n_tokens <= len(self._marks):
            raise ValueError(f"expected from 0 to {len(self._marks)} tokens to take back, got {n_tokens}")
        if n_tokens == 0:
            return
        mark = self._marks[-n_tokens]
        for _ in range(n_tokens):
            self._marks.pop()
        self._decoder.restore(mark.state)
        self._n_hidden = mark.n_hidden
        self._pending = self._pending[: mark.start - self._n_taken]
        self._n_exempt = min(self._n_exempt, mark.start)
        self._releasable = self._n_releasable()
        self.stopped = False
        self.n_banned_tokens = 0

    def finish(self) -> None:
        """No more tokens come: what was held back is text after all."""
        if not self.stopped and not self._append(self._decoder.flush()):
            self._releasable = len(self._pending)

    def _append(self, text: str, *, may_stop: bool = True) -> bool:
        assert not self.stopped, "text after a stop string"
        assert not self.n_banned_tokens, "text after a banned string"
        hidden = min(self._n_hidden, len(text))
        self._n_hidden -= hidden
        text = text[hidden:]
        if not text:
            return False
        self._pending += text
        # The string that begins first ends the text; of two that begin together, the one that is complete first.
        if not may_stop:
            self._n_exempt = self._n_taken + len(self._pending)
        end = min((place for one in self._stop if (place := self._find(one)) >= 0), default=None)
        banned_at = self._banned.find(self._pending[:end]) if self._banned else None
        if banned_at is not None:
            self._releasable = 0
            self.n_banned_tokens = self._tokens_from(banned_at)
            return False
        if end is not None:
            self._releasable = end
            self.stopped = True
            return True
        self._releasable = self._n_releasable()
        return False

    def _find(self, stop: str) -> int:
        return self._pending.find(stop, max(0, self._n_exempt - self._n_taken - len(stop) + 1))

    def _n_releasable(self) -> int:
        """Leading characters that can be part of no such string, whatever becomes of the tokens after them."""
        text = self._pending
        if self._n_kept_back:
            first = self._marks[max(0, len(self._marks) - self._n_kept_back)] if self._marks else None
            text = "" if first is None else text[: first.start - self._n_taken]
        # A token that may be taken back says nothing about the text before it; what that alone could become counts.
        while self._banned and (begin := self._banned.begins_at(text)) < len(text):
            mark = self._marks[-self._tokens_from(begin)]
            text = text[: mark.start - self._n_taken]
        return len(text) - max((overlap(text, stop) for stop in self._stop), default=0)

    def _tokens_from(self, place: int) -> int:
        """How many tokens there are from the one on that has this character of the pending text."""
        start = self._n_taken + place
        return next(n for n, mark in enumerate(reversed(self._marks), start=1) if mark.start <= start)

"""Finds where the end of a growing text has occurred before. Knows integers only.

A suffix automaton holds every substring of a text in at most two states a token, and is extended by a token in
amortised constant time. Each state stands for substrings that end at the same places; its link leads to the longest
shorter one that ends at more places. So the link of the whole text's state is the longest ending that has occurred
before, and with each state goes one place where it ended.

Source: Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985).
"""

from __future__ import annotations

from collections.abc import Iterable


class SuffixAutomaton:
    """The substrings of a text of token ids.

    Attributes:
        token_ids: the text.
        n_recurring: length of its longest ending that has occurred before; 0 if not even the last token has.
        recurred_at: where that occurrence ended.
    """

    __slots__ = ("_end", "_last", "_length", "_link", "_next", "n_recurring", "recurred_at", "token_ids")

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        self.token_ids: list[int] = []
        self._next: list[dict[int, int]] = [{}]  # of each state: the state after one token more
        self._link = [-1]
        self._length = [0]  # of the longest substring
        self._end = [0]  # where it ended the last time it was met as a recurrence, or the first time
        self._last = 0  # the state of the whole text
        self.n_recurring = 0
        self.recurred_at = 0
        for token_id in token_ids:
            self.extend(token_id)

    def __len__(self) -> int:
        return len(self.token_ids)

    def extend(self, token_id: int) -> None:
        """Add a token to the text."""
        follow, link, length, end = self._next, self._link, self._length, self._end
        self.token_ids.append(token_id)
        position = len(self.token_ids)
        state, new = self._last, len(follow)
        follow.append({})
        length.append(position)
        end.append(position)
        link.append(0)
        while state >= 0 and token_id not in follow[state]:
            follow[state][token_id] = new
            state = link[state]
        if state >= 0:
            target = follow[state][token_id]
            if length[target] != length[state] + 1:
                target = self._split(state, token_id, target)
            link[new] = target
        self._last = new
        # The place of the recurrence that comes next time is this one, which is nearer.
        found = link[new]
        self.n_recurring = length[found]
        self.recurred_at = end[found]
        end[found] = position

    def continuation(self, n_tokens: int) -> list[int]:
        """What came after the earlier occurrence; where that runs into the end of the text, the text goes on as it
        has since then, in a circle. Empty without a recurrence.
        """
        if self.n_recurring == 0:
            return []
        following = self.token_ids[self.recurred_at : self.recurred_at + n_tokens]
        period = len(following)
        while len(following) < n_tokens:
            following.append(following[len(following) - period])
        return following

    def _split(self, state: int, token_id: int, target: int) -> int:
        """Give the substrings of `target` that are no longer than those of `state` and a token a state of their own."""
        copy = len(self._next)
        self._next.append(dict(self._next[target]))
        self._length.append(self._length[state] + 1)
        self._link.append(self._link[target])
        self._end.append(self._end[target])
        self._link[target] = copy
        while state >= 0 and self._next[state].get(token_id) == target:
            self._next[state][token_id] = copy
            state = self._link[state]
        return copy

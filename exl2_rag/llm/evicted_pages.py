"""A bounded memory of pages that were evicted, so that a miss can say "it was here". Knows token ids, no tensors."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence as Seq
from itertools import islice

MAX_LOOKED_AT = 256
"""Pages after the same one that a search compares, the youngest first."""

_Place = tuple[bytes, int]


class EvictedPages:
    """The last `capacity` evicted pages: their keys and tokens, found by what they followed.

    Args:
        capacity: pages remembered; the oldest is forgotten first. A page takes some 4 bytes a token.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._order: deque[tuple[_Place, array[int], bytes | None]] = deque()
        self._by_place: dict[_Place, deque[array[int]]] = {}
        self._n_of_key: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._order)

    def add(self, parent_key: bytes, token_ids: Seq[int], key: bytes | None) -> None:
        """Remember a page. `key` is None for a page that was not full."""
        if not self._capacity:
            return
        if len(self._order) == self._capacity:
            self._drop_oldest()
        place, tokens = (parent_key, token_ids[0]), array("q", token_ids)
        self._order.append((place, tokens, key))
        self._by_place.setdefault(place, deque()).append(tokens)
        if key is not None:
            self._n_of_key[key] = self._n_of_key.get(key, 0) + 1

    def has(self, key: bytes) -> bool:
        """Whether a full page of this key is remembered."""
        return key in self._n_of_key

    def longest_match(self, parent_key: bytes, wanted: Seq[int]) -> int:
        """How many tokens of `wanted` a remembered page after `parent_key` agrees with at best."""
        if not wanted:
            return 0
        best = 0
        there = self._by_place.get((parent_key, wanted[0]), deque())
        for tokens in islice(reversed(there), MAX_LOOKED_AT):
            n_equal = 0
            for left, right in zip(tokens, wanted, strict=False):
                if left != right:
                    break
                n_equal += 1
            best = max(best, n_equal)
        return best

    def _drop_oldest(self) -> None:
        place, tokens, key = self._order.popleft()
        there = self._by_place[place]
        # The oldest of all is the oldest of its place; comparing by value would take an equal, younger one.
        assert there[0] is tokens
        there.popleft()
        if not there:
            del self._by_place[place]
        if key is not None:
            self._n_of_key[key] -= 1
            if not self._n_of_key[key]:
                del self._n_of_key[key]

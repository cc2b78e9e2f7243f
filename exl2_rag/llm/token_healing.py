"""Token healing: lets the first new token take in the end of the prompt. Knows bytes and token ids, no tensors.

A prompt that ends in the middle of what would usually be one token ("http:" before "//") leads the model astray: it
has hardly ever seen the rest begin a token of its own. So the last tokens of the prompt are taken away, as many as
together could be the beginning of a longer token, and the first new tokens must spell them again before they may go on.

Source: the idea is guidance's (Lundberg, "The art of prompt design: prompt boundaries and token healing", 2023).
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from exl2_rag.llm.tokenizer import Tokenizer


class VocabularyPrefixes:
    """The ordinary tokens of a vocabulary, sorted by their bytes.

    Args:
        tokens: bytes by token id; those of tokens without text, or that are never to be written, are empty.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        self._order = sorted((token, token_id) for token_id, token in enumerate(tokens) if token)
        self.longest = max(map(len, tokens), default=0)

    def beginning_with(self, start: bytes) -> list[int]:
        """Ids of the tokens that begin with these bytes."""
        first = bisect_left(self._order, (start, -1))
        last = first
        while last < len(self._order) and self._order[last][0].startswith(start):
            last += 1
        return [token_id for _, token_id in self._order[first:last]]

    def beginning_of(self, text: bytes) -> list[int]:
        """Ids of the tokens with which these bytes begin, they themselves excepted."""
        found = []
        for length in range(1, min(len(text), self.longest + 1)):
            first = bisect_left(self._order, (text[:length], -1))
            while first < len(self._order) and self._order[first][0] == text[:length]:
                found.append(self._order[first][1])
                first += 1
        return found

    def can_grow(self, start: bytes) -> bool:
        """Whether a token begins with these bytes and goes on."""
        first = bisect_left(self._order, (start + b"\0", -1))
        return first < len(self._order) and self._order[first][0].startswith(start)


@dataclass(frozen=True, slots=True)
class Healing:
    """What was taken from the end of a prompt.

    Attributes:
        n_tokens: how many tokens.
        text: their bytes, which the new tokens must begin with.
        n_characters: as many characters of the new text are not new.
        vocabulary: to find the tokens that fit.
    """

    n_tokens: int
    text: bytes
    n_characters: int
    vocabulary: VocabularyPrefixes

    def allowed(self, new_token_ids: Sequence[int], vocab_size: int) -> NDArray[np.bool_] | None:
        """[V] bool: what may come after these new tokens; None if anything may, for the text is there again."""
        rest = self.text
        for token_id in new_token_ids:
            rest = rest[len(self.vocabulary.tokens[token_id]) :]
            if not rest:
                return None
        mask = np.zeros(vocab_size, dtype=np.bool_)
        mask[[*self.vocabulary.beginning_with(rest), *self.vocabulary.beginning_of(rest)]] = True
        return mask


def heal(tokenizer: Tokenizer, token_ids: Sequence[int]) -> Healing | None:
    """What to take from the end of a prompt: the most tokens that a longer token could begin with; None: nothing.

    Special tokens stay, and so does the first token.
    """
    vocabulary = _vocabulary(tokenizer)
    best, text = 0, b""
    for n_tokens in range(1, len(token_ids)):
        token = vocabulary.tokens[token_ids[-n_tokens]] if token_ids[-n_tokens] < len(vocabulary.tokens) else b""
        if not token or len(token) + len(text) > vocabulary.longest:
            break
        text = token + text
        if vocabulary.can_grow(text) and _is_whole(text):
            best = n_tokens
    if not best:
        return None
    kept, taken = token_ids[:-best], token_ids[-best:]
    text = b"".join(vocabulary.tokens[token_id] for token_id in taken)
    return Healing(best, text, len(tokenizer.decode(taken, after=kept)), vocabulary)


def _is_whole(text: bytes) -> bool:
    """Whether the bytes are whole characters."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[Tokenizer, VocabularyPrefixes] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: Tokenizer) -> VocabularyPrefixes:
    with _lock:
        known = _known.get(tokenizer)
        if known is None:
            ids = range(tokenizer.vocab_size)
            tokens = [b"" if tokenizer.is_special(n) else tokenizer.token_bytes(n) for n in ids]
            known = _known[tokenizer] = VocabularyPrefixes(tokens)
        return known

"""A tokenizer as the grammar engine sees it.

Left to itself, the engine encodes forced text as a model's library would: special tokens that stand in the text are
read as such, and a normaliser may change it. Here a forced text is only ever encoded to tokens that spell it byte for
byte.
"""

from __future__ import annotations

import re
import threading
import weakref
from typing import TYPE_CHECKING

from llguidance import LLTokenizer, TokenizerWrapper

if TYPE_CHECKING:
    from exl2_rag.llm.tokenizer import Tokenizer

# Tokens that lie wholly within one of these classes are allowed or not as one, which spares walking the vocabulary
# inside JSON strings. They are the ones that every string of ours may hold: narrower than the engine's own, which take
# in U+2028 and so would help no text that is to be a single line.
_SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(rf'[^"\\\x00-\x1F\x7F-\x9F\u2028\u2029]{times}' for times in ("{1,10}", "{1,30}", "+")),
]


class _Vocabulary:
    """What `llguidance.TokenizerWrapper` asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Weak, because what is kept per tokenizer must not keep the tokenizer; matchers hold on to theirs.
        self._tokenizer = weakref.ref(tokenizer)
        self.tokens = [tokenizer.token_bytes(n) for n in range(tokenizer.vocab_size)]
        self.special_token_ids = [n for n in range(tokenizer.vocab_size) if tokenizer.is_special(n)]
        # The engine must have an end token; where the model has none it adds one past the vocabulary.
        self.eos_token_id = next(iter(tokenizer.eos_token_ids), None)
        self._of_byte = {token[0]: n for n, token in reversed([*enumerate(self.tokens)]) if len(token) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids that spell `text`, the usual ones where they do."""
        if isinstance(text, bytes):
            text = text.decode()
        ids = self._usual(text)
        if self._spell(ids, text):
            return ids
        return [n for word in re.findall(r"\s*\S+|\s+", text) for n in self._spelled(word)]

    def _spelled(self, word: str) -> list[int]:
        ids = self._usual(word)
        return ids if self._spell(ids, word) else [self._of_byte[byte] for byte in word.encode()]

    def _usual(self, text: str) -> list[int]:
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "a matcher holds on to its tokenizer"
        return tokenizer.encode_continuation(text)

    def _spell(self, ids: list[int], text: str) -> bool:
        return b"".join(self.tokens[n] for n in ids) == text.encode()


_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[Tokenizer, LLTokenizer] = weakref.WeakKeyDictionary()


def ll_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    """The engine's view of a tokenizer; built once (up to a second for a large vocabulary), then kept with it."""
    with _lock:
        known = _known.get(tokenizer)
        if known is None:
            wrapper = TokenizerWrapper(_Vocabulary(tokenizer))
            eos = list(tokenizer.eos_token_ids) or None
            known = _known[tokenizer] = LLTokenizer(wrapper, eos_token=eos, slices=_SLICES)
        return known

"""The constraint's contract and the matcher that walks a grammar token by token.

Knows llguidance and the tokenizer; knows nothing of engines, tensors or what a grammar means.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from exl2_rag.errors import ConstraintError
from exl2_rag.llm.constraint.vocabulary import ll_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from exl2_rag.llm.tokenizer import Tokenizer


class Constraint(ABC):
    """A set of texts, one of which the continuation must be. Immutable, and safe to share between requests.

    The grammar is built and checked once per tokenizer, at the first `validate`, `matches` or `compile`.
    """

    # Whether to work out beforehand which tokens fit the grammar's large expressions. Pays when most will be met.
    _precompute = True

    def validate(self, tokenizer: Tokenizer) -> None:
        """Make sure that the constraint can be enforced in full, and that some text obeys it.

        Raises:
            ConstraintError: it is malformed, contradicts itself, or asks for what cannot be enforced.
        """
        self.compile(tokenizer)

    def matches(self, text: str, tokenizer: Tokenizer) -> bool:
        """Whether `text`, whole, obeys the constraint.

        Raises:
            ConstraintError: as for `validate`.
        """
        matcher = self.compile(tokenizer)
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate: no model can write it
            return False
        return matcher.accepts_rest(text)

    def compile(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> ConstraintMatcher:
        """A fresh matcher at the start of the text.

        Args:
            tokenizer: of the model that writes the text.
            vocab_size: V, the width of the model's logits; None: the tokenizer's own.

        Raises:
            ConstraintError: as for `validate`.
        """
        with _lock:
            made = _made.setdefault(self, weakref.WeakKeyDictionary()).get(tokenizer)
        if made is None:
            made = self._make(tokenizer)
            with _lock:
                _made[self][tokenizer] = made
        return ConstraintMatcher(made.deep_copy(), tokenizer, self._what, vocab_size or tokenizer.vocab_size)

    def _make(self, tokenizer: Tokenizer) -> LLMatcher:
        """The matcher at the start of the text, checked."""
        # The verbose errors would add pages of parser state to every message.
        limits = LLParserLimits(verbose_errors=False, precompute_large_lexemes=self._precompute)
        made = LLMatcher(ll_tokenizer(tokenizer), self._grammar, log_level=0, limits=limits)
        messages = [made.get_error()] if made.is_error() else made.get_grammar_warnings()
        if messages:
            raise ConstraintError(f"{self._what} cannot be enforced: {'; '.join(messages)}")
        start = ConstraintMatcher(made.deep_copy(), tokenizer, self._what, tokenizer.vocab_size)
        if not (start.accepts_end or start.fill_mask().any()):
            raise ConstraintError(f"no text obeys {self._what}: it contradicts itself")
        return made

    @cached_property
    def _grammar(self) -> str:
        return self._build_grammar()

    @property
    def _what(self) -> str:
        """How messages name this constraint."""
        return f"the {type(self).__name__} constraint"

    @abstractmethod
    def _build_grammar(self) -> str:
        """The constraint in llguidance's own form. Raises ConstraintError for what it cannot express."""


class ConstraintMatcher:
    """One text in progress. Not thread-safe; one matcher serves one sequence.

    Every method that reads or changes the state raises ConstraintError if the grammar engine gives up (a limit on its
    work, of which a message tells).
    """

    def __init__(self, matcher: LLMatcher, tokenizer: Tokenizer, what: str, vocab_size: int) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._ll_tokenizer = ll_tokenizer(tokenizer)
        self._what = what
        self._vocab_size = vocab_size
        # The grammar engine writes whole 32-bit words for its own vocabulary; ids from there to V stay forbidden.
        self._known = min(vocab_size, tokenizer.vocab_size)
        self._bits = np.zeros((self._ll_tokenizer.vocab_size + 31) // 32, dtype=np.int32)
        self._ends = 0  # end tokens taken after the text was finished, which the engine does not count
        self._check()

    def fill_mask(self, out: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """The tokens that may come next.

        Args:
            out: [V] bool, written in place and returned; None: a new array.

        Returns:
            [V] bool, True where allowed. At a possible end of the text every end-of-sequence id is allowed; past the
            tokenizer's vocabulary nothing is.
        """
        if out is None:
            out = np.empty(self._vocab_size, dtype=np.bool_)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        out[: self._known] = np.unpackbits(self._bits.view(np.uint8), count=self._known, bitorder="little")
        out[self._known :] = False
        return out

    def advance(self, token_id: int) -> None:
        """Take the next token.

        Raises:
            ConstraintError: the token is not allowed here; the matcher is of no use after that.
        """
        self._ends += self._matcher.is_stopped()
        if not self._matcher.consume_token(token_id):
            raise ConstraintError(f"token {token_id} is not allowed by {self._what}: {self._matcher.get_error()}")

    def forced_tokens(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would write them; empty if there is a choice.

        Does not take them: `advance` with each.
        """
        forced = self._matcher.compute_ff_tokens()
        self._check()
        return forced[: self._matcher.validate_tokens(forced)] if forced else forced

    def count_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may come next, one after the other. Does not take them."""
        n_allowed = self._matcher.validate_tokens(list(token_ids))
        self._check()
        return n_allowed

    def rollback(self, n_tokens: int) -> None:
        """Undo the last `n_tokens` calls of `advance`."""
        ends = min(self._ends, n_tokens)
        self._ends -= ends
        if not self._matcher.rollback(n_tokens - ends):
            raise ConstraintError(f"cannot go back {n_tokens} tokens in {self._what}: {self._matcher.get_error()}")

    def accepts_rest(self, text: str) -> bool:
        """Whether the text so far and `text` together are a whole one. The matcher is of no use after that."""
        tokens = self._ll_tokenizer.greedy_tokenize(text)
        if self._ll_tokenizer.decode_bytes(tokens) != text.encode():
            return False  # the vocabulary cannot write it
        return self._matcher.try_consume_tokens(tokens) == len(tokens) and self._matcher.is_accepting()

    @property
    def accepts_end(self) -> bool:
        """Whether the text so far is a whole one."""
        return self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether the text so far is a whole one and nothing but the end can follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"{self._what} cannot be enforced: {self._matcher.get_error()}")


_lock = threading.Lock()
_made: weakref.WeakKeyDictionary[Constraint, weakref.WeakKeyDictionary[Tokenizer, LLMatcher]]
_made = weakref.WeakKeyDictionary()

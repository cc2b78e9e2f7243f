"""Constraints on plain text: a regular expression, a grammar, one of several texts."""

from __future__ import annotations

import json
from collections.abc import Iterable

from llguidance import LLMatcher

from exl2_rag.errors import ConstraintError
from exl2_rag.llm.constraint.base import Constraint


class Regex(Constraint):
    """The whole text matches a regular expression.

    The dialect is that of Rust's `regex` (Unicode classes, no look-around, no back-references, no word borders). It is
    always matched against the whole text, so `^` and `$` are not needed.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def _build_grammar(self) -> str:
        if not self.pattern:
            raise ConstraintError("Regex got an empty pattern, which allows only the empty text; give a pattern")
        return LLMatcher.grammar_from_regex(_encodable(self.pattern, "the pattern"))


class Lark(Constraint):
    """The text follows a context-free grammar in Lark's notation, with llguidance's extensions; rule `start` first."""

    def __init__(self, grammar: str) -> None:
        self.grammar = grammar

    def _build_grammar(self) -> str:
        return LLMatcher.grammar_from_lark(_encodable(self.grammar, "the grammar"))


class Choice(Constraint):
    """The text is exactly one of the given ones."""

    def __init__(self, options: Iterable[str]) -> None:
        if isinstance(options, str):
            raise ConstraintError(f'Choice takes several texts, got the one text {options!r}; write Choice(["…", "…"])')
        self.options = tuple(options)

    def _build_grammar(self) -> str:
        if not self.options:
            raise ConstraintError("Choice got no options, so no text could be written; give at least one")
        for option in self.options:
            if not isinstance(option, str) or not option:
                raise ConstraintError(f"every option of Choice is a text of at least one character, got {option!r}")
        return LLMatcher.grammar_from_lark(f"start: OPTION\nOPTION: {any_of_literals(self.options)}\n")


def any_of_literals(texts: Iterable[str]) -> str:
    """A Lark expression for exactly these texts."""
    return " | ".join(json.dumps(_encodable(text, "a text")) for text in dict.fromkeys(texts))


def _encodable(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConstraintError(f"{what} holds a lone surrogate, which is no character; remove it: {text!r}") from error
    return text

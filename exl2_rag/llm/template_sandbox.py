"""The Jinja environment that chat templates are written for, in a sandbox.

It has what the hub's own library gives templates (`raise_exception`, `strftime_now`, a `tojson` that leaves characters
alone, loop controls, the `generation` tag) and, unlike Jinja's sandbox alone, fails at once when a template reaches for
Python's internals.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which a forbidden attribute is an error, not an empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse `obj.attribute`."""
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}, which is forbidden")


class GenerationTag(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        """Take the tag away and keep its body, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def make_environment() -> ChatEnvironment:
    """A fresh environment; templates made from it see nothing but what they are rendered with."""
    environment = ChatEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)

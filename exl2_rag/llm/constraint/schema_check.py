"""Refuses JSON Schemas that ask for more than decoding can enforce.

The grammar engine refuses many keywords itself, but skips those it has never heard of, such as a misspelt one. Here
every keyword is either known to be enforced, known to be a mere remark, or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from exl2_rag.errors import ConstraintError

_ENFORCED = frozenset(
    [
        "type",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "properties",
        "patternProperties",
        "additionalProperties",
        "required",
        "minProperties",
        "maxProperties",
        "items",
        "prefixItems",
        "additionalItems",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
    ]
)
_REMARKS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "example",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$schema",
        "$id",
        "id",
        "$defs",
        "definitions",
        "discriminator",
    ]
)
_MAPS_OF_SCHEMAS = ("properties", "patternProperties")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("additionalProperties", "additionalItems", "items")


def check_schema(schema: dict[str, Any]) -> None:
    """Walk a schema and all that it refers to.

    Raises:
        ConstraintError: a keyword that cannot be enforced, with its place.
    """
    seen: set[str] = set()
    waiting: list[tuple[str, Any]] = [("#", schema)]
    while waiting:
        place, part = waiting.pop()
        if place in seen or isinstance(part, bool):
            continue
        seen.add(place)
        if not isinstance(part, dict):
            raise ConstraintError(f"{place}: a schema is an object, true or false, got {part!r}")
        for keyword in part:
            if keyword not in _ENFORCED | _REMARKS:
                raise ConstraintError(
                    f"{place}: the keyword {keyword!r} cannot be enforced while decoding; remove it, or check the "
                    "finished text for it"
                )
        waiting += _parts(place, part)
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            waiting.append((reference, _resolve(schema, reference, place)))


def _parts(place: str, part: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema, with their places."""
    for keyword in _MAPS_OF_SCHEMAS:
        entries = part.get(keyword, {})
        if not isinstance(entries, dict):
            raise ConstraintError(f"{place}/{keyword} must be an object of schemas, got {entries!r}")
        yield from ((f"{place}/{keyword}/{_escape(name)}", inner) for name, inner in entries.items())
    for keyword in _LISTS_OF_SCHEMAS:
        entries = part.get(keyword, [])
        if not isinstance(entries, list):
            raise ConstraintError(f"{place}/{keyword} must be a list of schemas, got {entries!r}")
        yield from ((f"{place}/{keyword}/{n}", inner) for n, inner in enumerate(entries))
    for keyword in _SCHEMAS:
        if keyword in part:
            inner = part[keyword]
            if keyword == "items" and isinstance(inner, list):  # the older form of prefixItems
                yield from ((f"{place}/items/{n}", entry) for n, entry in enumerate(inner))
            else:
                yield f"{place}/{keyword}", inner


def _resolve(schema: dict[str, Any], reference: str, place: str) -> Any:
    found: Any = schema
    for step in reference.removeprefix("#").split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            raise ConstraintError(f"{place}: $ref {reference!r} leads nowhere in the schema")
    return found


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")

"""Refuses JSON Schemas that ask for more than decoding can enforce.

The grammar engine refuses many keywords itself, but skips those it has never heard of, such as a misspelt one, and
takes some in a looser sense than the standard. Here every keyword is enforced, a mere remark, or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from exl2_rag.errors import ConstraintError

_ENFORCED_ON_ANY = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
_ENFORCED_ON_OBJECTS = {"properties", "patternProperties", "additionalProperties", "required"}
_ENFORCED_ON_ARRAYS = {"items", "prefixItems", "additionalItems", "minItems", "maxItems"}
_ENFORCED_ON_STRINGS = {"minLength", "maxLength", "pattern", "format"}
_ENFORCED_ON_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_ENFORCED = frozenset(
    {"minProperties", "maxProperties"}
    | _ENFORCED_ON_ANY
    | _ENFORCED_ON_OBJECTS
    | _ENFORCED_ON_ARRAYS
    | _ENFORCED_ON_STRINGS
    | _ENFORCED_ON_NUMBERS
)
_REMARKS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator"}
    | {"$comment", "$schema", "$id", "id", "$defs", "definitions"}
)
_MAPS_OF_SCHEMAS = ("properties", "patternProperties")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("additionalProperties", "additionalItems", "items")
# JSON can write these only as "\u0000", and such escapes are not allowed (see JsonSchema).
_UNWRITABLE = re.compile("[\x00-\x07\x0b\x0e-\x1f]")


def check_schema(schema: dict[str, Any], change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Walk a schema and all that it refers to.

    Args:
        schema: JSON's own types only.
        change: called on every schema object in it that counts, after that was checked; may change the object.

    Raises:
        ConstraintError: a keyword that cannot be enforced, with its place, or no text can obey the schema.
    """
    parts = dict(_walk(schema))
    _check_that_it_ends(schema, parts)
    if change is not None:
        for part in parts.values():
            change(part)


def _walk(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema object that counts, checked, with its place."""
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
            is_vendor_remark = keyword.startswith("x-") and keyword != "x-guidance"
            if keyword not in _ENFORCED | _REMARKS and not is_vendor_remark:
                raise ConstraintError(
                    f"{place}: the keyword {keyword!r} cannot be enforced while decoding; remove it, or check the "
                    "finished text for it"
                )
        _check_values(place, part)
        waiting += _inner(place, part)
        if "$ref" in part:
            waiting.append((_normal(part["$ref"], place), resolve(schema, part["$ref"], place)))
        yield place, part


def _check_values(place: str, part: dict[str, Any]) -> None:
    if place != "#" and ("$id" in part or "id" in part):
        raise ConstraintError(
            f"{place}: an $id inside a schema changes what references mean; only the root may have one"
        )
    for value in (part.get("const"), part.get("enum"), list(part.get("properties", ()))):
        if any(_UNWRITABLE.search(text) for text in _strings(value)):
            raise ConstraintError(f"{place}: {value!r:.80} holds a control character that cannot be written; remove it")
    fewest = part.get("minProperties", 0)
    if isinstance(fewest, int) and fewest > max(1, len(set(_list(part.get("required"))))):
        raise ConstraintError(
            f"{place}: minProperties {fewest} cannot be enforced, since a repeated property would count twice; "
            "name the properties in required"
        )


def _inner(place: str, part: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema, with their places."""
    for keyword in _MAPS_OF_SCHEMAS:
        entries = part.get(keyword, {})
        if not isinstance(entries, dict):
            raise ConstraintError(f"{place}/{keyword} must be an object of schemas, got {entries!r:.80}")
        yield from ((f"{place}/{keyword}/{_escape(name)}", inner) for name, inner in entries.items())
    for keyword in _LISTS_OF_SCHEMAS:
        entries = part.get(keyword, [])
        if not isinstance(entries, list):
            raise ConstraintError(f"{place}/{keyword} must be a list of schemas, got {entries!r:.80}")
        yield from ((f"{place}/{keyword}/{n}", inner) for n, inner in enumerate(entries))
    for keyword in _SCHEMAS:
        if keyword in part:
            inner = part[keyword]
            if keyword == "items" and isinstance(inner, list):  # the older form of prefixItems
                yield from ((f"{place}/items/{n}", entry) for n, entry in enumerate(inner))
            else:
                yield f"{place}/{keyword}", inner


def resolve(schema: dict[str, Any], reference: Any, place: str) -> Any:
    """What a reference at `place` leads to.

    Raises:
        ConstraintError: it leads nowhere, or out of the schema.
    """
    found: Any = schema
    for step in _normal(reference, place).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            raise ConstraintError(f"{place}: $ref {reference!r} leads nowhere in the schema")
    return found


def _normal(reference: Any, place: str) -> str:
    if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
        raise ConstraintError(f'{place}: $ref must lead into the same schema ("#/$defs/name"), got {reference!r}')
    return unquote(reference)


def _check_that_it_ends(schema: dict[str, Any], parts: dict[str, dict[str, Any]]) -> None:
    """Refuse a schema whose every instance would have to contain itself.

    A schema ends once all that it requires ends; growing the set of those that do until nothing is added leaves out
    exactly the ones that never could.
    """
    ending: set[int] = set()
    grown = True
    while grown:
        before = len(ending)
        ending.update(id(part) for place, part in parts.items() if _ends(schema, place, part, ending))
        grown = len(ending) > before
    if id(schema) not in ending:
        raise ConstraintError("no text obeys the schema: it requires itself inside itself without end")


def _ends(schema: dict[str, Any], place: str, part: dict[str, Any], ending: set[int]) -> bool:
    def does(inner: Any) -> bool:
        return inner is True or id(inner) in ending or not isinstance(inner, dict | bool)

    types = set(_list(part.get("type", ["object", "array", "string"])))
    required = [part.get("properties", {}).get(name, True) for name in _list(part.get("required"))]
    first = part.get("prefixItems") or (part["items"] if isinstance(part.get("items"), list) else [])
    rest = part["items"] if isinstance(part.get("items"), dict) else True
    fewest = part.get("minItems", 0)
    elements = [*first, *([rest] * (fewest - len(first)))] if isinstance(fewest, int) and fewest < 1000 else []
    return (
        ("$ref" not in part or does(resolve(schema, part["$ref"], place)))
        and all(does(inner) for inner in part.get("allOf", []))
        and all(any(does(inner) for inner in part[key]) for key in ("anyOf", "oneOf") if part.get(key))
        and (types != {"object"} or all(does(inner) for inner in required))
        and (types != {"array"} or all(does(inner) for inner in elements[:fewest]))
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")

"""JSON that obeys a JSON Schema.

The text is compact (no whitespace between values), properties come in the order in which the schema declares them, and
characters are escaped only where JSON asks for it. Unlike a validator, decoding also enforces "format".
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher

from exl2_rag.errors import ConstraintError
from exl2_rag.llm.constraint.base import Constraint
from exl2_rag.llm.constraint.schema_check import check_schema
from exl2_rag.llm.constraint.schema_formats import tighten

if TYPE_CHECKING:
    from pydantic import BaseModel

# Without "u": an escaped letter in a key ("\\u0061") would pass for another property than the one it names.
_ESCAPES = 'nrbtf\\"'


class JsonSchema(Constraint):
    """The text is one JSON value that obeys a schema.

    Args:
        schema: a JSON Schema as a mapping or as JSON text, or a pydantic model class. A class stands for its own
            fields: where it does not say what it does with further ones, none are written.

    Raises:
        ConstraintError: it is none of these, or no JSON.
    """

    def __init__(self, schema: Mapping[str, Any] | str | type[BaseModel]) -> None:
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ConstraintError(f"the schema is not JSON: {error}") from error
        elif isinstance(schema, type) and hasattr(schema, "model_json_schema"):
            schema = _closed(schema.model_json_schema())
        if not isinstance(schema, Mapping):
            raise ConstraintError(
                f"a schema is a mapping, the JSON text of one, or a pydantic model class; got {type(schema).__name__}"
            )
        self.schema: dict[str, Any] = copy.deepcopy(dict(schema))

    def _build_grammar(self) -> str:
        try:
            text = json.dumps(self.schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConstraintError(f"the schema holds something that is not JSON: {error}") from error
        schema = json.loads(text)
        check_schema(schema, tighten)
        return LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_flexible": False, "json_allowed_escapes": _ESCAPES}
        )


def _closed(schema: Any) -> Any:
    """A pydantic class's schema without room for properties it does not declare."""
    if isinstance(schema, list):
        return [_closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(inner) for key, inner in schema.items()}
    if closed.get("type") == "object" and "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed

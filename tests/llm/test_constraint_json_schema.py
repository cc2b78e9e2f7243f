from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from exl2_rag.errors import ConstraintError
from exl2_rag.llm.constraint import JsonSchema
from tests.support.constraint_walks import random_text
from tests.support.shared_data import shared_path
from tests.support.tokenizer_families import family


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TABLE: list[tuple[dict[str, Any], Sequence[str], Sequence[str]]] = [
    (an_object(a={"type": "integer"}, b={"type": "string"}),
     ['{"a":1,"b":"x"}', '{"a":-1,"b":""}', '{"a":0,"b":"\\"\\\\\\n"}'],
     ['{"a": 1,"b":"x"}', '{"b":"x","a":1}', '{"a":1}', '{"a":1,"b":"x","c":1}', '{"a":1,"b":"x"} ', "{}", ""]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
     ["{}", '{"a":1}', '{"a":1,"b":"x"}', '{"b":"x"}'],
     ['{"a":"x"}', '{"a":1,"a":"x"}', '{"a":1,"\\u0061":"x"}', '{"b":1}']),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
     ["[true]", "[true,false]"], ["[]", "[true,]", "[true,true,true]", "[1]", "[true, false]"]),
    ({"enum": ["red", 3, None, {"k": [1]}]}, ['"red"', "3", "null", '{"k":[1]}'], ['"blue"', "4", "red", '{"k": [1]}']),
    ({"type": "string", "minLength": 2, "maxLength": 3},
     ['"ab"', '"é👍"', '"\\n\\n"'], ['"a"', '"abcd"', '"👍"', '"a\nb"']),
    ({"type": "string", "pattern": "^[A-Z]{2}$"}, ['"AB"'], ['"A"', '"ABC"', '"ab"']),
    ({"type": "string", "pattern": "b"}, ['"abc"', '"b"'], ['"ac"', '""']),
    ({"type": "string", "pattern": "^\\S$"}, ['"a"'], ['" "', '"\ufeff"']),
    ({"type": "number", "minimum": 1, "exclusiveMaximum": 2}, ["1", "1.5"], ["0.9", "2", "2.0", "1e"]),
    ({"type": "integer", "multipleOf": 3}, ["0", "9", "-3"], ["1", "10"]),
    ({"anyOf": [{"type": "null"}, {"type": "integer"}]}, ["null", "1"], ['"x"', "1.5"]),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, ["3"], ["2", "null"]),
    ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}, ["1"], ["x", '"1"']),
    ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"type": "integer"}}}, ["1"], ['"1"']),
    ({"type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False},
     ["{}", '{"child":{"child":{}}}'], ['{"child":1}', '{"child":{"x":1}}']),
    ({"type": "string", "format": "date"}, ['"2024-02-29"', '"2000-02-29"', '"1999-12-31"'],
     ['"2023-02-29"', '"1900-02-29"', '"2024-04-31"', '"2024-13-01"', '"2024-1-1"']),
    ({"type": "string", "format": "date", "pattern": "^2"}, ['"2024-02-29"'], ['"1999-12-31"', '"2"']),
    ({"type": "string", "format": "date-time"}, ['"2024-02-29T23:59:59Z"', '"2024-02-29T00:00:00.5+01:00"'],
     ['"2024-02-29T24:00:00Z"', '"2024-02-29T23:59:60Z"', '"2024-02-30T00:00:00Z"', '"2024-02-29T00:00:00"']),
    ({"type": "string", "format": "hostname"},
     ['"a"', '"a-b.example.com"', '"a1"', '"abc"', '"a-b--c"', f'"{"a" * 63}.b"'],
     ['"-a"', '"a-"', '"xn--abc"', f'"{"a" * 64}"', '"a..b"', f'"{".".join(["a" * 50] * 6)}"', '""']),
    ({"type": "object", "minProperties": 1, "additionalProperties": {"type": "integer"}},
     ['{"a":1}'], ["{}", '{"a":"x"}']),
    ({"title": "a remark", "description": "d", "default": 3, "x-vendor": {"y": 1}, "type": "integer"}, ["3"], ['"3"']),
]  # fmt: skip


@pytest.mark.parametrize("name", ["byte", "mistral-v1", "qwen2"])
@pytest.mark.parametrize(("schema", "accepted", "rejected"), TABLE)
def test_texts_are_accepted_and_rejected(
    name: str, schema: dict[str, Any], accepted: Sequence[str], rejected: Sequence[str]
) -> None:
    tokenizer, constraint = family(name), JsonSchema(schema)
    assert [text for text in accepted if not constraint.matches(text, tokenizer)] == []
    assert [text for text in rejected if constraint.matches(text, tokenizer)] == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "maxLenght": 3}, "#: the keyword 'maxLenght'"),
        (an_object(a={"not": {"type": "null"}}), "#/properties/a: the keyword 'not'"),
        ({"type": "array", "items": {"uniqueItems": True}}, "#/items: the keyword 'uniqueItems'"),
        ({"anyOf": [{"type": "null"}, {"if": {}}]}, "#/anyOf/1: the keyword 'if'"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"contains": {}}}}, "#/\\$defs/x: the keyword 'contains'"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "integer", "x-guidance": {"lenient": True}}, "x-guidance"),
        ({"type": "string", "format": "zip-code"}, "zip-code"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "oneOf"),
        ({"type": "object", "minProperties": 2}, "minProperties 2"),
        ({"$ref": "#/$defs/x"}, "leads nowhere"),
        ({"$ref": "https://example.org/schema"}, "same schema"),
        ({"$ref": 3}, "same schema"),
        ({"properties": {"a": {"$id": "b"}}}, "only the root"),
        ({"properties": []}, "object of schemas"),
        ({"anyOf": {}}, "list of schemas"),
        ({"properties": {"a": 3}}, "object, true or false"),
        ({"const": "\x07"}, "control character"),
        ({"properties": {"\x00": {}}}, "control character"),
        ({"required": "a"}, "required"),
        ({"minLength": -1}, "minLength"),
        ({"type": "text"}, "text"),
    ],
)
def test_what_cannot_be_enforced_is_named_before_generation(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        JsonSchema(schema).validate(family("byte"))


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": []},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "string", "minLength": 3, "maxLength": 2},
        an_object(a=False),
        {"const": 1, "type": "string"},
        {"$ref": "#"},
        an_object(child={"$ref": "#"}),
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"anyOf": [{"$ref": "#"}]},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": an_object(b={"$ref": "#/$defs/b"}), "b": an_object(a={"$ref": "#/$defs/a"})},
        },
    ],
)
def test_a_schema_that_no_text_can_obey_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ConstraintError):
        JsonSchema(schema).validate(family("byte"))


@pytest.mark.parametrize("schema", [[], 3, True, "[]", "{", "3", dict])
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ConstraintError, match="schema is"):
        JsonSchema(schema)


def test_a_schema_that_is_no_json_is_refused() -> None:
    for value in ({1, 2}, float("nan"), object()):
        with pytest.raises(ConstraintError, match="not JSON"):
            JsonSchema({"const": value}).validate(family("byte"))


def test_the_schema_is_copied_and_left_alone() -> None:
    schema = {"type": "string", "format": "date"}
    constraint = JsonSchema(schema)
    schema["type"] = "integer"
    constraint.validate(family("byte"))
    assert constraint.schema == {"type": "string", "format": "date"}


class Claim(BaseModel):
    source: Literal["d1", "d2"]
    words: list[str] = Field(max_length=2)
    day: date | None


class Reply(BaseModel):
    claims: list[Claim] = Field(min_length=1, max_length=2)
    score: float = Field(ge=0, le=1)


def test_a_pydantic_model_is_a_schema() -> None:
    constraint = JsonSchema(Reply)
    good = Reply(claims=[Claim(source="d1", words=["a"], day=date(2024, 2, 29))], score=0.5)
    assert constraint.matches(good.model_dump_json(), family("byte"))
    assert not constraint.matches(good.model_dump_json().replace("d1", "d3"), family("byte"))
    assert not constraint.matches(good.model_dump_json()[:-1] + ',"more":1}', family("byte"))
    assert JsonSchema(json.dumps(Reply.model_json_schema())).matches(good.model_dump_json(), family("byte"))


@pytest.mark.parametrize("name", ["byte", "mistral-v1", "mistral-tekken", "qwen2"])
def test_random_walks_give_instances_of_the_model(name: str) -> None:
    class Short(BaseModel):
        kind: Literal["a", "b"]
        label: str = Field(min_length=1, max_length=6)
        day: date
        numbers: list[Annotated[int, Field(ge=-1000, le=1000)]] = Field(max_length=3)

    constraint = JsonSchema(Short)
    for seed in range(8):
        text = random_text(constraint, family(name), seed)
        assert text is not None
        if json.loads(text)["day"] >= "0001":  # Python knows no year 0
            assert Short.model_validate_json(text)
        outside_strings = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
        assert not re.search(r"\s", outside_strings)


JSON_STRINGS = st.text(st.characters(min_codepoint=0x20, codec="utf-8"))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | JSON_STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_STRINGS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(value=JSON_VALUES)
def test_a_constant_accepts_its_own_compact_form(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if "\x7f" not in text:  # the engine escapes DEL, which Python's writer does not
        assert JsonSchema({"const": value}).matches(text, family("byte"))
    assert not JsonSchema({"const": value}).matches(text + " ", family("byte"))


# --- public suites ----------------------------------------------------------------------------------------------------


def wrong_accepts(cases: Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]) -> tuple[int, int, list[str]]:
    """How many schemas compiled, how many instances were tried, and the invalid ones that were accepted."""
    tokenizer = family("byte")
    compiled, tried, wrong = 0, 0, []
    for schema, instances in cases:
        try:
            constraint = JsonSchema(schema)
            constraint.validate(tokenizer)
        except ConstraintError:
            continue
        compiled += 1
        for instance in instances:
            tried += 1
            text = json.dumps(instance["data"], ensure_ascii=False, separators=(",", ":"))
            if constraint.matches(text, tokenizer) and not instance["valid"]:
                wrong.append(f"{schema} accepts {text}")
    return compiled, tried, wrong


@pytest.mark.shared
def test_no_invalid_instance_of_the_json_schema_suite_is_accepted() -> None:
    root = shared_path("data/json-schema-test-suite/tests")
    groups = (group for path in sorted(root.rglob("*.json")) for group in json.loads(path.read_text("utf-8")))
    compiled, tried, wrong = wrong_accepts((group["schema"], group["tests"]) for group in groups)
    assert wrong == []
    assert compiled >= 850
    assert tried >= 4500


@pytest.mark.shared
@pytest.mark.parametrize("part", ["Glaiveai2K", "Github_trivial", "MCPspec", "WashingtonPost"])
def test_no_invalid_instance_of_jsonschemabench_is_accepted(part: str) -> None:
    path = shared_path(f"data/jsonschemabench/{part}.jsonl.xz")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    compiled, _, wrong = wrong_accepts((record["schema"], record["tests"]) for record in records)
    assert wrong == []
    assert compiled > 0

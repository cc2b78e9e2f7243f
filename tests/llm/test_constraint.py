from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from exl2_rag.errors import ConstraintError, RequestError
from exl2_rag.llm.constraint import Choice, Constraint, JsonSchema, Lark, Regex
from exl2_rag.llm.tokenizer import Tokenizer
from tests.support.byte_tokenizer import BOS_ID, END_ID, EOS_ID, VOCAB_SIZE, write_byte_tokenizer
from tests.support.constraint_walks import random_text
from tests.support.tokenizer_families import family

FAMILIES = ("byte", "metaspace-first", "mistral-v3", "mistral-tekken", "qwen2")
each_family = pytest.mark.parametrize("name", FAMILIES)
ODD_TEXTS = [
    'a"b',
    "a\\b",
    "a\nb",
    "tab\t",
    "é👍",
    "\x07",
    "\x7f",
    "\u2028",
    "a/b",
    "\\n",
    "\\u0041",
    "i'm",
    "#%//",
    "%x|y",
]


def allowed(mask: np.ndarray) -> list[int]:
    return [int(n) for n in np.flatnonzero(mask)]


# --- what is accepted -------------------------------------------------------------------------------------------------

TABLE: list[tuple[Constraint, Sequence[str], Sequence[str]]] = [
    (Choice(["yes", "no", "yes and no"]), ["yes", "no", "yes and no"], ["", "y", "yess", "yes ", "yes and", "maybe"]),
    (Choice(["a"]), ["a"], ["", "aa", "b"]),
    (Regex("[0-9]{3}-[0-9]{2}"), ["123-45"], ["", "123-4", "123-456", "x123-45", "١٢٣-٤٥"]),
    (Regex("^ab$"), ["ab"], ["", "a", "abc", "^ab$"]),
    (Regex("a|b*"), ["", "a", "b", "bbb"], ["ab", "c"]),
    (Regex("é+👍"), ["é👍", "éé👍"], ["é", "👍"]),
    (
        Lark('start: greeting " " NAME\ngreeting: "hi" | "hello"\nNAME: /[A-Z][a-z]+/'),
        ["hi Bob"],
        ["hi", "hi bob", "hey Bob"],
    ),
    (JsonSchema({"type": "integer"}), ["0", "-12"], ["", "1.5", "01", '"1"', " 1", "1 "]),
]


@each_family
@pytest.mark.parametrize(("constraint", "accepted", "rejected"), TABLE)
def test_texts_are_accepted_and_rejected(
    name: str, constraint: Constraint, accepted: Sequence[str], rejected: Sequence[str]
) -> None:
    tokenizer = family(name)
    assert [text for text in accepted if not constraint.matches(text, tokenizer)] == []
    assert [text for text in rejected if constraint.matches(text, tokenizer)] == []


@each_family
def test_options_may_hold_any_character(name: str) -> None:
    tokenizer = family(name)
    choice = Choice(ODD_TEXTS)
    for text in ODD_TEXTS:
        assert choice.matches(text, tokenizer), text
        assert not choice.matches(text + "x", tokenizer)
    assert not choice.matches("a\\nb", tokenizer)


def test_a_lone_surrogate_matches_nothing() -> None:
    assert not Regex("(?s:.)*").matches("\ud800", family("byte"))


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Choice([]), "no options"),
        (Choice(["a", ""]), "at least one character"),
        (Choice(["a", "\ud800"]), "lone surrogate"),
        (Choice(["a", 3]), "at least one character"),  # type: ignore[list-item]
        (Regex(""), "empty pattern"),
        (Regex("["), "unclosed character class"),
        (Regex("(?=a)b"), "look-around"),
        (Regex(r"(a)\1"), "backreferences"),
        (Regex(r"\bword"), "lookarounds"),
        (Lark('begin: "a"'), "start"),
        (Lark("start: nowhere"), "nowhere"),
        (Lark("start: <|no-such-token|>"), "no-such-token"),
    ],
)
def test_what_cannot_be_enforced_is_an_error_before_generation(constraint: Constraint, message: str) -> None:
    tokenizer = family("byte")
    with pytest.raises(ConstraintError, match=message):
        constraint.validate(tokenizer)
    with pytest.raises(ConstraintError):
        constraint.matches("a", tokenizer)
    with pytest.raises(ConstraintError):
        constraint.compile(tokenizer)


def test_one_text_is_no_list_of_choices() -> None:
    with pytest.raises(ConstraintError, match="several texts"):
        Choice("yes")


def test_a_constraint_error_is_a_request_error_and_stays_short() -> None:
    with pytest.raises(RequestError) as caught:
        Regex("[").validate(family("byte"))
    assert len(str(caught.value)) < 500


def test_special_tokens_can_stand_in_a_grammar() -> None:
    tokenizer = family("byte")
    matcher = Lark('start: <|tool|> "a"').compile(tokenizer)
    assert allowed(matcher.fill_mask()) == [262]


# --- the matcher ------------------------------------------------------------------------------------------------------


def test_the_mask_holds_exactly_what_may_follow() -> None:
    matcher = Choice(["ab", "ac", "b"]).compile(family("byte"))
    assert allowed(matcher.fill_mask()) == [ord("a"), ord("b")]
    matcher.advance(ord("a"))
    assert allowed(matcher.fill_mask()) == [ord("b"), ord("c")]
    assert not matcher.accepts_end
    matcher.advance(ord("c"))
    assert matcher.accepts_end
    assert matcher.is_finished


def test_every_end_id_is_allowed_at_a_possible_end_and_only_there() -> None:
    matcher = Regex("a+").compile(family("byte"))
    assert allowed(matcher.fill_mask()) == [ord("a")]
    matcher.advance(ord("a"))
    assert allowed(matcher.fill_mask()) == [ord("a"), EOS_ID, END_ID]
    assert matcher.accepts_end
    assert not matcher.is_finished
    matcher.advance(END_ID)
    assert matcher.is_finished


def test_after_a_finished_text_only_the_end_is_allowed() -> None:
    matcher = Choice(["a"]).compile(family("byte"))
    matcher.advance(ord("a"))
    assert allowed(matcher.fill_mask()) == [EOS_ID, END_ID]


def test_padding_of_the_models_vocabulary_is_never_allowed() -> None:
    matcher = Regex("(?s:.)+").compile(family("byte"), vocab_size=352)
    mask = matcher.fill_mask()
    assert mask.shape == (352,)
    assert mask.dtype == np.bool_
    assert not mask[VOCAB_SIZE:].any()
    assert mask[: ord("z")].any()


def test_a_head_narrower_than_the_vocabulary_gets_a_mask_of_its_width() -> None:
    mask = Regex("(?s:.)+").compile(family("byte"), vocab_size=100).fill_mask()
    assert mask.shape == (100,)
    assert mask.all()


def test_the_mask_is_written_into_the_given_array() -> None:
    matcher = Choice(["a"]).compile(family("byte"))
    out = np.ones(VOCAB_SIZE, dtype=np.bool_)
    assert matcher.fill_mask(out) is out
    assert allowed(out) == [ord("a")]


def test_special_tokens_are_never_allowed_inside_a_text() -> None:
    assert not Regex("(?s:.)+").compile(family("byte")).fill_mask()[BOS_ID:].any()


def test_a_token_that_is_not_allowed_is_refused() -> None:
    matcher = Choice(["a"]).compile(family("byte"))
    with pytest.raises(ConstraintError, match="token 98 is not allowed"):
        matcher.advance(98)


@each_family
def test_forced_tokens_are_written_as_the_tokenizer_would(name: str) -> None:
    tokenizer = family(name)
    schema = {"type": "object", "properties": {"answerable": {"type": "boolean"}}, "required": ["answerable"]}
    matcher = JsonSchema(schema).compile(tokenizer)
    forced = matcher.forced_tokens()
    text = tokenizer.decode(forced, after=tokenizer.encode("x"))
    assert '{"answerable":'.startswith(text)
    assert len(text) >= len('{"answerable')
    for token_id in forced:
        assert matcher.fill_mask()[token_id]
        matcher.advance(token_id)


def test_where_there_is_a_choice_nothing_is_forced() -> None:
    matcher = Choice(["ab", "c"]).compile(family("byte"))
    assert matcher.forced_tokens() == []
    matcher.advance(ord("a"))
    assert matcher.forced_tokens() == [ord("b")]
    assert matcher.forced_tokens() == [ord("b")], "asking does not take them"


def test_rollback_restores_the_state() -> None:
    matcher = Regex("[ab]{3}").compile(family("byte"))
    masks = [matcher.fill_mask()]
    for byte in b"aba":
        matcher.advance(byte)
        masks.append(matcher.fill_mask())
    matcher.advance(EOS_ID)
    matcher.rollback(2)
    assert (matcher.fill_mask() == masks[2]).all()
    matcher.rollback(2)
    assert (matcher.fill_mask() == masks[0]).all()
    with pytest.raises(ConstraintError, match="go back"):
        matcher.rollback(1)


def test_rollback_goes_back_over_an_end_token() -> None:
    for pattern in ("a", "a+"):
        matcher = Regex(pattern).compile(family("byte"))
        matcher.advance(ord("a"))
        before = matcher.fill_mask()
        matcher.advance(END_ID)
        matcher.rollback(1)
        assert (matcher.fill_mask() == before).all()
        matcher.rollback(1)
        assert allowed(matcher.fill_mask()) == [ord("a")]


def test_matchers_of_one_constraint_are_independent() -> None:
    constraint, tokenizer = Choice(["ab", "cd"]), family("byte")
    first, second = constraint.compile(tokenizer), constraint.compile(tokenizer)
    first.advance(ord("a"))
    assert allowed(second.fill_mask()) == [ord("a"), ord("c")]
    assert allowed(constraint.compile(tokenizer).fill_mask()) == [ord("a"), ord("c")]


def test_one_constraint_serves_several_tokenizers() -> None:
    constraint = Choice(["Hello world"])
    for name in FAMILIES:
        assert random_text(constraint, family(name), seed=0) == "Hello world"


def test_a_tokenizer_without_an_end_token_still_finishes(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    definition = (tmp_path / "tokenizer.json").read_text().replace("<|eos|>", "<|one|>").replace("<|end|>", "<|two|>")
    (tmp_path / "tokenizer.json").write_text(definition)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.eos_token_ids == ()
    matcher = Choice(["a"]).compile(tokenizer)
    matcher.advance(ord("a"))
    assert matcher.is_finished
    assert matcher.fill_mask().shape == (VOCAB_SIZE,)
    assert not matcher.fill_mask().any()
    assert Choice(["a"]).matches("a", tokenizer)


@each_family
@pytest.mark.parametrize("constraint", [Choice(ODD_TEXTS), Regex("(é|日本|👍🏽|[a-c ]){1,12}!")])
def test_random_walks_write_only_texts_that_match(name: str, constraint: Constraint) -> None:
    tokenizer = family(name)
    for seed in range(5):
        text = random_text(constraint, tokenizer, seed)
        assert text is not None
        assert constraint.matches(text, tokenizer), text

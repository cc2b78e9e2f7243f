from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from exl2_rag.errors import ConstraintError
from exl2_rag.llm.constraint import AnswerWithQuotes
from exl2_rag.llm.constraint.quotes import split_at_word_borders
from tests.support.constraint_walks import random_text
from tests.support.tokenizer_families import family

DECLINED = '{"answerable":false,"claims":[]}'
TOWER = 'The Eiffel Tower\n(330 m tall, "La dame de fer") cost 7.8 million in 1887–1889; it isn\'t rusty.'
ODD = 'A\tC:\\new\\table — "x"\x07\x0b y\u00a0z\u2028ends… 日本語の文。 naïve e\u0301te\u0301 👩\u200d👩\u200d👧 ok</s>'
PASSAGES: dict[str, str | Sequence[str]] = {
    "d1": TOWER,
    "d2": ODD,
    "d3": ['He said: "No."', "Tabs\tand\\slashes.", "Über alles \u2028 x", "One"],
}


def answer(*claims: tuple[str, str, str]) -> str:
    listed = [{"source": source, "quote": quote, "text": text} for source, quote, text in claims]
    return json.dumps({"answerable": True, "claims": listed}, ensure_ascii=False, separators=(",", ":"))


def assert_answer_holds(
    text: str, passages: Mapping[str, str | Sequence[str]], *, min_words: int, max_claims: int
) -> None:
    """Everything the constraint promises, checked without it."""
    reply: dict[str, Any] = json.loads(text)
    assert list(reply) == ["answerable", "claims"]
    assert reply["answerable"] is bool(reply["claims"])
    assert len(reply["claims"]) <= max_claims
    for claim in reply["claims"]:
        assert list(claim) == ["source", "quote", "text"]
        assert claim["text"].strip()
        assert len(claim["text"].splitlines()) == 1
        passage, quote = passages[claim["source"]], claim["quote"]
        if isinstance(passage, str):
            assert len(quote.split()) >= min(min_words, len(passage.split()))
            assert any(stands_at_word_borders(quote, passage, at) for at in occurrences(quote, passage)), quote
        else:
            assert quote in passage


def occurrences(quote: str, passage: str) -> list[int]:
    return [at for at in range(len(passage)) if passage.startswith(quote, at)]


def stands_at_word_borders(quote: str, passage: str, at: int) -> bool:
    before, after = passage[at - 1 : at], passage[at + len(quote) :][:1]
    cuts_head = (before.isalnum() and before.isascii()) and (quote[0].isalnum() and quote[0].isascii())
    cuts_tail = (after.isalnum() and after.isascii()) and (quote[-1].isalnum() and quote[-1].isascii())
    return bool(quote) and not (cuts_head or cuts_tail or quote[0].isspace() or quote[-1].isspace())


# --- what is accepted -------------------------------------------------------------------------------------------------

ACCEPTED = [
    DECLINED,
    answer(("d1", "The Eiffel Tower", "t")),
    answer(("d1", "Tower\n(330 m", "t")),
    answer(("d1", 'tall, "La dame', "t")),
    answer(("d1", 'La dame de fer") cost 7.8 million', "t")),
    answer(("d1", "million in 1887–1889", "t")),
    answer(("d1", "it isn't rusty", "t")),
    answer(("d1", "it isn't rusty.", "t")),
    answer(("d1", TOWER, "t")),
    answer(("d2", "A\tC:\\new\\table —", "t")),
    answer(("d2", 'C:\\new\\table — "x"\x07\x0b y', "t")),
    answer(("d2", "y\u00a0z\u2028ends", "t")),
    answer(("d2", "ends… 日本語の文。 naïve e\u0301te\u0301", "t")),
    answer(("d2", "本語の文。 naïve e\u0301te\u0301", "t")),
    answer(("d2", "naïve e\u0301te\u0301 👩\u200d👩\u200d👧", "t")),
    answer(("d3", 'He said: "No."', "t")),
    answer(("d3", "Tabs\tand\\slashes.", "t")),
    answer(("d3", "Über alles \u2028 x", "t")),
    answer(("d3", "One", "t")),
    answer(("d1", "The Eiffel Tower", 'He said "a\\b" é👍'), ("d3", "One", "x"), ("d1", "330 m tall", "y")),
]
REJECTED = [
    "",
    "{}",
    DECLINED + " ",
    DECLINED.replace(",", ", "),
    '{"answerable":true,"claims":[]}',
    '{"answerable":false,"claims":[{"source":"d3","quote":"One","text":"t"}]}',
    answer(("d4", "The Eiffel Tower", "t")),
    answer(("d2", "The Eiffel Tower", "t")),
    answer(("d3", "The Eiffel Tower", "t")),
    answer(("d1", "the Eiffel Tower", "t")),
    answer(("d1", "Eiffel Tower", "t")),
    answer(("d1", "The Eiffel tall", "t")),
    answer(("d1", "The Eiffel Tower ", "t")),
    answer(("d1", " Eiffel Tower\n(330 m", "t")),
    answer(("d1", "iffel Tower\n(330 m", "t")),
    answer(("d1", "cost 7.8 mill", "t")),
    answer(("d1", 'fer") cost 7', "t")),
    answer(("d1", "8 million in 1887–1889", "t")),
    answer(("d1", "million in 1887", "t")),
    answer(("d1", "The Eiffel Tower (330 m", "t")),
    answer(("d1", "", "t")),
    answer(("d2", 'new\\table — "x"', "t")),
    answer(("d2", "naïve e\u0301te\u0301 👩", "t")),
    answer(("d3", "He said:", "t")),
    answer(("d3", "On", "t")),
    answer(("d3", "", "t")),
    answer(("d3", "One", "")),
    answer(("d3", "One", " x")),
    answer(("d3", "One", "a\nb")),
    answer(("d3", "One", "a\u2028b")),
    answer(("d3", "One", "x" * 31)),
    answer(*[("d3", "One", "x")] * 4),
    answer(("d3", "One", "x")).replace('"source"', '"Source"'),
]


@pytest.mark.parametrize("name", ["byte", "mistral-v1", "qwen2"])
def test_answers_are_accepted_and_rejected(name: str) -> None:
    tokenizer, constraint = family(name), AnswerWithQuotes(PASSAGES, max_text_chars=30)
    assert [text for text in ACCEPTED if not constraint.matches(text, tokenizer)] == []
    assert [text for text in REJECTED if constraint.matches(text, tokenizer)] == []


def test_the_text_may_have_as_many_characters_as_allowed() -> None:
    constraint = AnswerWithQuotes({"d3": ["One"]}, max_text_chars=3)
    for text, fits in [("abc", True), ("é👍\\", True), ('"\\"', True), ("abcd", False)]:
        assert constraint.matches(answer(("d3", "One", text)), family("byte")) is fits, text


def test_a_passage_shorter_than_the_least_is_quoted_whole() -> None:
    constraint = AnswerWithQuotes({"d1": "Two words"}, min_words=3)
    assert constraint.matches(answer(("d1", "Two words", "t")), family("byte"))
    assert not constraint.matches(answer(("d1", "Two", "t")), family("byte"))


def test_min_words_of_one_allows_single_words() -> None:
    constraint = AnswerWithQuotes({"d1": "Two words"}, min_words=1)
    assert constraint.matches(answer(("d1", "words", "t")), family("byte"))
    assert not constraint.matches(answer(("d1", "word", "t")), family("byte"))


def test_without_passages_only_declining_is_left() -> None:
    constraint = AnswerWithQuotes({})
    assert constraint.matches(DECLINED, family("byte"))
    assert random_text(constraint, family("byte"), seed=0) == DECLINED


def test_labels_may_hold_any_character() -> None:
    label = 'a"b\\c\n'
    assert AnswerWithQuotes({label: ["One"]}).matches(answer((label, "One", "t")), family("byte"))


def test_a_quote_cannot_be_spliced_from_two_places() -> None:
    text = "red fish swim. blue fish fly away today"
    constraint = AnswerWithQuotes({"d1": text})
    assert constraint.matches(answer(("d1", "blue fish fly", "t")), family("byte"))
    assert not constraint.matches(answer(("d1", "red fish fly", "t")), family("byte"))


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (AnswerWithQuotes({"d1": " \n"}), "'d1' holds no word"),
        (AnswerWithQuotes({"d1": []}), "'d1' lists no quote"),
        (AnswerWithQuotes({"d1": ["a", ""]}), "'d1' lists no quote"),
        (AnswerWithQuotes({"d1": "a \ud800"}), "lone surrogate"),
        (AnswerWithQuotes({"d1": ["\ud800"]}), "lone surrogate"),
        (AnswerWithQuotes(PASSAGES, max_claims=0), "max_claims"),
        (AnswerWithQuotes(PASSAGES, min_words=0), "min_words"),
        (AnswerWithQuotes(PASSAGES, max_text_chars=0), "max_text_chars"),
    ],
)
def test_what_cannot_be_quoted_is_an_error_before_generation(constraint: AnswerWithQuotes, message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        constraint.validate(family("byte"))


@pytest.mark.parametrize("name", ["byte", "mistral-v1", "qwen2"])
def test_forced_tokens_spell_special_looking_and_unnormalised_text(name: str) -> None:
    tokenizer = family(name)
    quote = "one </s> <|im_end|> <|end|> e\u0301te\u0301 end"
    matcher = AnswerWithQuotes({"d1": [quote]}).compile(tokenizer)
    head = '{"answerable":true,"claims":[{"source":"d1","quote":"'
    for token_id in tokenizer.encode_continuation(head + "one"):
        matcher.advance(token_id)
    written = b""
    while forced := matcher.forced_tokens():
        for token_id in forced:
            assert not tokenizer.is_special(token_id)
            matcher.advance(token_id)
            written += tokenizer.token_bytes(token_id)
    assert written.decode().startswith(quote.removeprefix("one"))


# --- word borders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The cat.", ["The", " ", "cat", "."]),
        ('say "no"!', ["say", " ", '"', "no", '"', "!"]),
        ("3.14 and 1,000", ["3.14", " ", "and", " ", "1,000"]),
        ("-5 °C", ["-5", " ", "°C"]),
        ("don't well-known", ["don't", " ", "well-known"]),
        ("(a)  [b],\n", ["(", "a", ")", "  ", "[", "b", "]", ",", "\n"]),
        ("end—start", ["end", "—", "start"]),
        ("日本語。", ["日", "本", "語", "。"]),
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("👍🏽👍", ["👍🏽", "👍"]),
        ("...", [".", ".", "."]),
        ("", []),
    ],
)
def test_texts_are_cut_at_word_borders(text: str, pieces: list[str]) -> None:
    assert split_at_word_borders(text) == pieces


CONTROLS = ["\n", "\t", "\x00", "\x0b", "\x1c", "\x1f", "\x85"]
WORDS = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=6),
    st.sampled_from(
        [*CONTROLS, '"', "\\", "\\n", "\\u0041", "é", "e\u0301", "👍🏽", "3.14", "it's", "日本", "</s>", "<|end|>"]
    ),
)
TEXTS = st.lists(WORDS, min_size=1, max_size=12).map(" ".join)


@given(text=TEXTS)
def test_pieces_joined_are_the_text(text: str) -> None:
    assert "".join(split_at_word_borders(text)) == text


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, data=st.data())
@example(text="a\x1cb \x0bc d", data=None)
def test_every_run_of_words_of_any_text_can_be_quoted(text: str, data: st.DataObject | None) -> None:
    assume(text.split())
    pieces = split_at_word_borders(text)
    solid = [n for n, piece in enumerate(pieces) if not piece.isspace()]
    first, last = (solid[0], solid[-1]) if data is None else sorted(data.draw(st.tuples(*[st.sampled_from(solid)] * 2)))
    quote = "".join(pieces[first : last + 1])
    constraint = AnswerWithQuotes({"d1": text}, min_words=2)
    enough = len(quote.split()) >= min(2, len(text.split()))
    assert constraint.matches(answer(("d1", quote, "t")), family("byte")) is enough


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, seed=st.integers(0, 2**32))
def test_random_walks_quote_verbatim_whatever_the_passage(text: str, seed: int) -> None:
    assume(text.split())
    passages = {"d1": text, "d2": [text]}
    written = random_text(AnswerWithQuotes(passages, min_words=2, max_text_chars=5), family("byte"), seed)
    assert written is not None
    assert_answer_holds(written, passages, min_words=2, max_claims=3)


@pytest.mark.parametrize("name", ["byte", "mistral-v1", "mistral-tekken", "qwen2"])
def test_random_walks_quote_verbatim_in_every_vocabulary(name: str) -> None:
    constraint = AnswerWithQuotes(PASSAGES, max_claims=2, max_text_chars=20)
    answered = 0
    for seed in range(12):
        written = random_text(constraint, family(name), seed)
        assert written is not None
        assert_answer_holds(written, PASSAGES, min_words=3, max_claims=2)
        assert constraint.matches(written, family(name))
        answered += written != DECLINED
    assert answered


def test_one_claim_at_most_is_one_claim() -> None:
    constraint = AnswerWithQuotes({"d1": ["Pages are shared.", "Quotes are exact."]}, max_claims=1)
    one = ("d1", "Quotes are exact.", "exact")
    assert constraint.matches(answer(one), family("byte"))
    assert constraint.matches(DECLINED, family("byte"))
    assert not constraint.matches(answer(one, one), family("byte"))


# --- speed ------------------------------------------------------------------------------------------------------------


def test_four_passages_of_250_words_compile_quickly_and_mask_quickly() -> None:
    words = [
        f"{head}{n % 211}" for n, head in zip(range(1000), ["word", "Tower", "the", "built", "in"] * 200, strict=True)
    ]
    passages = {f"d{n}": " ".join(words[250 * n : 250 * (n + 1)]) + "." for n in range(4)}
    tokenizer = family("mistral-v1")
    AnswerWithQuotes({}).validate(tokenizer)  # the grammar engine's view of the vocabulary is built once
    compile_s = []
    for _ in range(5):
        start = time.process_time()
        matcher = AnswerWithQuotes(passages).compile(tokenizer)
        compile_s.append(time.process_time() - start)
    mask_s = []
    text = answer(("d2", " ".join(words[510:530]), "The tower was built in the year that the text gives."))
    for token_id in tokenizer.encode_continuation(text):
        start = time.process_time()
        mask = matcher.fill_mask()
        mask_s.append(time.process_time() - start)
        assert mask[token_id]
        matcher.advance(token_id)
    assert matcher.is_finished
    assert min(compile_s) < 0.05
    assert statistics.median(mask_s) < 0.0005

"""Sentence splitting: where sentences end, and that offsets are exact whatever the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2_rag.retrieval.sentences import split_sentences


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. J. R. Smith met Mr. Jones. They spoke.", ["Dr. J. R. Smith met Mr. Jones.", "They spoke."]),
        ("It cost $3.14 in 1999. 1999 was a good year.", ["It cost $3.14 in 1999.", "1999 was a good year."]),
        ("He left the U.S. The U.S. Army stayed.", ["He left the U.S.", "The U.S. Army stayed."]),
        ("See Fig. 3 and pp. 4-5, e.g. Table 2.", ["See Fig. 3 and pp. 4-5, e.g. Table 2."]),
        ("He said no. Then he left at 3 p.m. on Jan. 5.", ["He said no.", "Then he left at 3 p.m. on Jan. 5."]),
        ("The cat sat. Dogs ran.", ["The cat sat.", "Dogs ran."]),
        ("Vitamin C. It helps.", ["Vitamin C.", "It helps."]),
        ("He met J. Smith.", ["He met J. Smith."]),
        ("Apples, pears, etc. They ate.", ["Apples, pears, etc.", "They ate."]),
        ('"Why?" he asked. "Because." She left.', ['"Why?" he asked.', '"Because."', "She left."]),
        ("He was told (in May. Or June.) to go. He went.", ["He was told (in May. Or June.) to go.", "He went."]),
        ("It is so.[12] Another fact.", ["It is so.[12]", "Another fact."]),
        ("Well... maybe. Well... Maybe.", ["Well... maybe.", "Well...", "Maybe."]),
        ("他说好。我们走！", ["他说好。", "我们走！"]),
        ("1. First thing.\n2. Second thing.", ["1. First thing.", "2. Second thing."]),
        ("Items:\n- one\n- two", ["Items:", "- one", "- two"]),
        ("A Heading\n\nSome text.", ["A Heading", "Some text."]),
        ("| a | b |\n| c | d |", ["| a | b |", "| c | d |"]),
        ("", []),
        (" \n\n ", []),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_a_line_wrapped_in_mid_sentence_does_not_end_it() -> None:
    text = "This line was wrapped by an old\nmail program. The rest follows."
    assert sentences(text) == ["This line was wrapped by an old\nmail program.", "The rest follows."]


def test_a_paragraph_break_ends_even_an_unfinished_sentence() -> None:
    text = "This line has no full stop and goes on\n\nin another paragraph."
    assert sentences(text) == ["This line has no full stop and goes on", "in another paragraph."]


@given(st.text(alphabet=st.sampled_from("aB1 .!?()\"'\n-|。é…"), max_size=300))
def test_sentences_are_in_order_trimmed_and_hold_every_visible_character(text: str) -> None:
    position = 0
    for start, end in split_sentences(text):
        assert position <= start < end <= len(text)
        assert text[position:start].strip() == ""
        assert text[start:end] == text[start:end].strip()
        assert "\n\n" not in text[start:end]
        position = end
    assert text[position:].strip() == ""


def test_a_long_text_without_full_stops_is_split_in_linear_time() -> None:
    text = "word (" * 50_000 + ". X" * 20_000
    assert split_sentences(text)[-1][1] == len(text)

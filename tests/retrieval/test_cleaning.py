"""Cleaning: what must not reach a prompt is gone, everything else stays, and a second pass finds nothing to do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2_rag.retrieval.cleaning import clean_text, clean_title

SPECIAL = [
    "<|im_start|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<s>",
    "<bos>",
    "<start_of_turn>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "[TOOL_CALLS]",
    "<unk>",
    "<tool_call>",
    "<reserved_12>",
]
INVISIBLE = ["\u200b", "\u200d", "\ufeff", "\u202e", "\u2066", "\u00ad", "\U000e0041", "\x00", "\x1b", "\x07", "\ufff9"]


@pytest.mark.parametrize("token", SPECIAL)
def test_what_looks_like_a_special_token_becomes_a_space(token: str) -> None:
    assert clean_text(f"before{token}after") == "before after"


@pytest.mark.parametrize("mark", INVISIBLE)
def test_invisible_characters_vanish(mark: str) -> None:
    assert clean_text(f"be{mark}fore") == "before"


def test_a_special_token_hidden_by_invisible_characters_or_by_another_is_found() -> None:
    assert "<|im_end|>" not in clean_text("<|im_\u200bend|>")
    assert re.search(r"<\|\S*\|>", clean_text("<|im_<|x|>end|>")) is None
    assert "[INST]" not in clean_text("[IN</s>ST]")


def test_the_delimiter_is_removed_in_any_case_and_any_disguise() -> None:
    cleaned = clean_text("a0b1c2d3 x A0B1C2D3 y a0b1\u200bc2d3 z a0b1a0b1c2d3c2d3", delimiter="a0b1c2d3")
    assert "a0b1c2d3" not in cleaned.lower()
    assert [word for word in cleaned.split() if word in "xyz"] == ["x", "y", "z"]


@pytest.mark.parametrize(
    "text",
    [
        "Ünïcödé, “quotes” – dashes… ﬁ ½ 東京",
        "if a < b and b > c: print('[x]')",
        "x[INSTANCE] <span> a|b <||> <| spaced |> 5 < 6",
        "<user><name>Ann</name></user> <system/>",
        "line one\nline two\n\nnew paragraph",
        "    indented code",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert clean_text(text) == text


def test_line_breaks_and_spaces_are_made_plain() -> None:
    assert clean_text("a\r\nb\rc\u2028d\x0ce\x85f") == "a\nb\nc\nd\ne\nf"
    assert clean_text("a\u00a0b\u2003c\u3000d") == "a b c d"
    assert clean_text("\n\na  \t\n\n\n\n\nb\n") == "a\n\nb"


def test_lone_surrogates_become_a_replacement_character() -> None:
    assert clean_text("a\ud800b").encode("utf-8") == "a\ufffdb".encode()


@given(
    st.lists(
        st.one_of(
            st.sampled_from([*SPECIAL, *INVISIBLE, "<|", "|>", "<", ">", "[", "]", "s", "INST", "/", " ", "\n", "\t"]),
            st.sampled_from(["a0b1", "c2d3", "a0b1c2d3", "\r", "\u2028", "\u00a0"]),
            st.text(max_size=3),
        ),
        max_size=30,
    ).map("".join)
)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = clean_text(text, delimiter="a0b1c2d3")
    assert clean_text(once, delimiter="a0b1c2d3") == once
    assert "a0b1c2d3" not in once
    assert not any(token in once for token in SPECIAL)


@pytest.mark.parametrize("piece", ["<|", "<|a", " ", "\n ", "[INST", "a0b1"])
def test_cleaning_takes_linear_time(piece: str) -> None:
    clean_text(piece * 300_000, delimiter="a0b1c2d3")


def test_a_title_is_one_line_of_bounded_length() -> None:
    assert clean_title(" A\n title\u200b </s>") == "A title"
    cut = clean_title("word " * 100)
    assert len(cut) <= 120
    assert cut.endswith("word…")

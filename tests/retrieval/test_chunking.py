"""Chunking: within the limit, in order, nothing lost, along the document's own structure."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2_rag.errors import TextTooLongError
from exl2_rag.retrieval.chunking import ChunkSpan, chunk_id_of, embedded_text, split_document
from exl2_rag.retrieval.document import Document, Markup


def count_words(text: str) -> int:
    """A tokenizer as BERT's: words and punctuation marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def count_bytes(text: str) -> int:
    """A tokenizer that gives a token a byte."""
    return len(text.encode("utf-8"))


def document(
    text: str, *, title: str = "A title", markup: Markup = "markdown", pages: tuple[int, ...] = ()
) -> Document:
    return Document("a.txt", title, text, "text/plain", pages, markup)


def texts(doc: Document, limit: int = 40) -> list[tuple[str, str]]:
    return [(span.heading, doc.text[span.start : span.end]) for span in split_document(doc, count_words, limit)]


words = st.text(alphabet="abcé", min_size=1, max_size=8)
lines = st.one_of(
    st.lists(words, min_size=1, max_size=30).map(" ".join),
    st.lists(words, min_size=1, max_size=12).map(lambda parts: ". ".join(parts) + "."),
    st.tuples(st.integers(1, 4), st.lists(words, min_size=1, max_size=4)).map(
        lambda pair: "#" * pair[0] + " " + " ".join(pair[1])
    ),
    st.sampled_from(["", "", "", "```", "~~~", "- item", "| a | b |", "x" * 400, "  indented", "A title", "# A title"]),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(lines, max_size=25).map("\n".join),
    st.sampled_from(["plain", "markdown", "code"]),
    st.sampled_from([count_words, count_bytes]),
    st.lists(st.integers(0, 400), max_size=3),
)
def test_chunks_are_in_order_within_the_limit_and_lose_nothing(text, markup, count_tokens, borders) -> None:
    pages = tuple(sorted({0, *(border for border in borders if border < len(text))}))
    doc = document(text, markup=markup, pages=pages)
    spans = split_document(doc, count_tokens, 60)
    assert_sound(doc, spans, count_tokens, 60)


def assert_sound(doc: Document, spans: list[ChunkSpan], count_tokens, limit: int) -> None:
    carried = {doc.title} | {name for span in spans for name in span.heading.split(" > ")}
    position = 0
    for span in [*spans, None]:
        end = span.start if span else len(doc.text)
        for line in doc.text[position:end].split("\n"):
            assert not line.strip() or line.strip().strip("#").strip() in carried, f"lost: {line!r}"
        if span is None:
            break
        piece = doc.text[span.start : span.end]
        assert position <= span.start < span.end
        assert piece == piece.strip()
        assert count_tokens(embedded_text(doc.title, span.heading, piece, count_tokens, limit)) <= limit
        assert span.page == doc.page_at(span.start)
        crossed = [start for start in doc.page_starts if span.start < start < span.end]
        assert not any(doc.text[:start].endswith("\n\n") for start in crossed), "a chunk crosses a page border"
        position = span.end


def test_a_paragraph_is_a_chunk_and_short_ones_are_joined() -> None:
    long_one = " ".join(["word"] * 20)
    doc = document(f"{long_one}\n\n{long_one}\n\nShort one.\n\nShort two.")
    assert texts(doc) == [("", long_one), ("", f"{long_one}\n\nShort one.\n\nShort two.")]


def test_chunks_carry_their_headings_and_do_not_repeat_them() -> None:
    doc = document("# A title\n\nIntro.\n\n## Part\n\n### Detail\n\nText.\n\n## Other\n\nMore.")
    assert texts(doc) == [("", "Intro."), ("Part > Detail", "Text."), ("Other", "More.")]


def test_a_title_heading_with_nothing_under_it_is_carried_by_every_chunk() -> None:
    assert texts(document("# A title\n\n# Part\n\nText.")) == [("Part", "Text.")]


def test_a_heading_that_nothing_follows_is_text() -> None:
    doc = document("## Part\n\nText.\n\n## Call 555-1234\n\n## Last")
    assert texts(doc) == [("Part", "Text."), ("", "## Call 555-1234"), ("", "## Last")]


def test_a_heading_too_long_to_carry_is_text() -> None:
    long_heading = "# " + "very long heading " * 10
    assert texts(document(f"{long_heading}\n\nText."), 80)[0][1].startswith("# very long")


def test_a_number_sign_inside_a_fence_is_no_heading() -> None:
    doc = document("# One\n\n```\n# a comment\n\nx = 1\n```\n\nAfter.")
    assert texts(doc) == [("One", "```\n# a comment\n\nx = 1\n```\n\nAfter.")]


def test_the_first_line_of_plain_text_that_is_the_title_is_carried_as_such() -> None:
    doc = document("Kenya\n\nKenya is a country.", title="Kenya", markup="plain")
    assert texts(doc) == [("", "Kenya is a country.")]


def test_a_sentence_that_goes_on_on_the_next_page_stays_whole() -> None:
    text = "First page ends in mid sentence and goes on here.\n\nSecond paragraph there, and quite enough words in it."
    doc = document(text, pages=(0, text.index("goes"), text.index("Second")))
    spans = split_document(doc, count_words, 40)
    assert [(span.page, doc.text[span.start : span.end]) for span in spans] == [
        (1, text.split("\n\n", maxsplit=1)[0]),
        (3, text.split("\n\n")[1]),
    ]


def test_a_long_paragraph_is_cut_at_sentences_into_parts_of_like_size() -> None:
    sentence = "Ten words and a full stop are in this one."
    doc = document(" ".join([sentence] * 6))
    parts = [text for _, text in texts(doc, 45)]
    assert all(part.endswith(".") for part in parts)
    assert [part.count("stop") for part in parts] == [3, 3]


def test_a_table_is_cut_between_rows() -> None:
    rows = [f"| row {number} | value |" for number in range(12)]
    parts = [text for _, text in texts(document("\n".join(rows)), 30)]
    assert len(parts) > 1
    assert "\n".join(parts).split("\n") == rows


def test_a_word_without_end_is_cut_although_the_tokenizer_counts_it_as_one() -> None:
    doc = document("x" * 5000)
    assert max(len(text) for _, text in texts(doc)) <= 400
    assert "".join(text for _, text in texts(doc)) == doc.text


def test_a_title_that_would_displace_the_text_is_not_embedded() -> None:
    assert embedded_text("many words in this title", "", "text", count_words, 8) == "text"
    assert embedded_text("two words", "a heading of five words", "text", count_words, 8) == "two words\ntext"
    assert embedded_text("T", "H", "text", count_words, 8) == "T\nH\ntext"


def test_a_tokenizer_that_cannot_fit_one_character_is_an_error() -> None:
    with pytest.raises(TextTooLongError, match="one character"):
        split_document(document("abc"), lambda text: 100 * len(text), 40)


def test_the_chunk_id_depends_on_every_part_and_on_nothing_else() -> None:
    base = ("a.txt", "title", "heading", "text", 0)
    ids = {chunk_id_of(*base)}
    assert chunk_id_of(*base) in ids
    for changed in (
        ("b.txt", "title", "heading", "text", 0),
        ("a.txt", "titleh", "eading", "text", 0),
        ("a.txt", "title", "heading", "text!", 0),
        ("a.txt", "title", "heading", "text", 1),
    ):
        assert chunk_id_of(*changed) not in ids
        ids.add(chunk_id_of(*changed))


def test_a_large_document_is_cut_in_reasonable_time() -> None:
    doc = document("word " * 60_000)
    assert len(split_document(doc, count_words, 254)) > 200

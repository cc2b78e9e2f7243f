"""PDF: paragraphs out of positions, running lines dropped, words mended, pages kept, trouble named."""

from __future__ import annotations

import pytest

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval import load_document
from exl2_rag.retrieval.loaders.extracted import LoadLimits
from exl2_rag.retrieval.loaders.pdf_file import read_pdf
from exl2_rag.retrieval.loaders.pdf_layout import BROKEN_WORD, Line, Page, pages_to_text
from tests.retrieval.loaders.make_files import column, pdf

FULL = "This line of text reaches the right margin of the page, as do"


def read(data: bytes) -> tuple[str, ...]:
    return read_pdf(data, LoadLimits().start()).pages


def test_lines_become_paragraphs_and_gaps_separate_them() -> None:
    lines = column([FULL, FULL, "the end."]) + column([FULL, "Second end."], top=720)
    assert read(pdf([lines])) == (f"{FULL} {FULL} the end.\n\n{FULL} Second end.",)


def test_larger_type_is_a_heading_and_the_largest_the_title() -> None:
    lines = [(72, 800, 20, "The Title"), (72, 770, 15, "1 Part"), *column([FULL, "end."], top=740)]
    extracted = read_pdf(pdf([lines]), LoadLimits().start())
    assert extracted.pages == (f"# The Title\n\n## 1 Part\n\n{FULL} end.",)
    assert extracted.title == "The Title"


def test_a_title_in_the_properties_counts_only_if_the_page_shows_it() -> None:
    lines = [(72, 800, 20, "Shown Title"), *column([FULL, "end."], top=740)]
    assert read_pdf(pdf([lines], title="Shown Title"), LoadLimits().start()).title == "Shown Title"
    assert read_pdf(pdf([lines], title="Microsoft Word - draft3.doc"), LoadLimits().start()).title == "Shown Title"


def test_running_heads_and_page_numbers_are_dropped_and_the_rest_of_the_margin_stays() -> None:
    pages = [
        [(72, 820, 9, "Annual Report"), *column([f"Body of page {word}."]), (290, 30, 9, f"- {number} -")]
        for number, word in enumerate(["one", "two", "three"], start=1)
    ]
    pages[0].append((72, 60, 9, "A footnote on page one only."))
    assert read(pdf(pages)) == (
        "Body of page one.\n\nA footnote on page one only.",
        "Body of page two.",
        "Body of page three.",
    )


def test_list_items_and_short_lines_keep_their_lines() -> None:
    lines = column(["- item one", "- item two", "Name: Ann", "City: Bonn"]) + column([FULL], top=600)
    assert read(pdf([lines])) == (f"- item one\n- item two\nName: Ann\nCity: Bonn\n\n{FULL}",)


def test_two_columns_are_read_one_after_the_other() -> None:
    left = column(["left one", "left two."])
    right = column(["right one", "right two."], left=320)
    assert read(pdf([[*left, *right]])) == ("left one left two.\n\nright one right two.",)


def line(text: str, row: int, *, left: float = 72, right: float = 500) -> Line:
    return Line(text, left, right, 700 - 14 * row, 11)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (f"the infor{BROKEN_WORD}", "mation is here", "the information is here"),
        ("the infor-", "mation is here", "the information is here"),
        ("the self-", "made man. A self-made man", "the self-made man. A self-made man"),
        (f"Schwarz{BROKEN_WORD}", "Weiß", "Schwarz-Weiß"),
        ("the years 1990-", "1995 were", "the years 1990- 1995 were"),
    ],
)
def test_words_broken_at_a_lines_end_are_mended(first, second, expected) -> None:
    texts, _ = pages_to_text([Page((line(first, 0), line(second, 1)), 842)])
    assert texts == [expected]


def test_an_exponent_is_joined_to_its_line() -> None:
    parts = (Line("area of 5 m", 72, 140, 700, 11), Line("2", 140, 144, 704, 7), Line("in all.", 148, 180, 700, 11))
    assert pages_to_text([Page(parts, 842)])[0] == ["area of 5 m2 in all."]


def test_page_starts_point_at_pages_and_a_sentence_goes_over_a_border(tmp_path) -> None:
    path = tmp_path / "a.pdf"
    pages = [column(["The sentence begins here"]), column(["and ends on page two."]), [], column(["Page Four."])]
    path.write_bytes(pdf(pages))
    document = load_document(path, root=tmp_path)
    assert document.text == "The sentence begins here and ends on page two.\n\nPage Four."
    assert [document.page_at(document.text.index(word)) for word in ("begins", "ends", "Four")] == [1, 2, 4]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no pdf at all", "broken"),
        (b"%PDF-1.4\nnothing more", "broken"),
        (pdf([[]]), "no-text-layer"),
        (pdf([column(["text"])])[:300], "broken"),
    ],
)
def test_what_cannot_be_read_says_why(data, reason) -> None:
    with pytest.raises(DocumentError) as caught:
        read(data)
    assert caught.value.reason == reason


def test_a_pdf_that_pdfium_refuses_is_read_by_pypdf(monkeypatch) -> None:
    import pypdfium2

    def fails(*_args, **_kwargs) -> None:
        raise pypdfium2.PdfiumError("cannot")

    monkeypatch.setattr(pypdfium2, "PdfDocument", fails)
    assert read(pdf([column(["Read by the other."])])) == ("Read by the other.",)


def test_too_many_pages_and_too_much_text_are_refused() -> None:
    data = pdf([column(["some text here"])] * 3)
    for limits in (LoadLimits(pages=2), LoadLimits(text_chars=20), LoadLimits(seconds=-1.0)):
        with pytest.raises(DocumentError) as caught:
            read_pdf(data, limits.start())
        assert caught.value.reason in ("too-large", "too-slow")

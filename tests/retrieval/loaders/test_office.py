"""Word, PowerPoint, Excel, EPUB, XML, e-mail, notebooks."""

from __future__ import annotations

import datetime
import io
import json

import pytest

from exl2_rag.retrieval.loaders.docx_file import read_docx
from exl2_rag.retrieval.loaders.extracted import Extracted, LoadLimits
from exl2_rag.retrieval.loaders.markup_files import read_email, read_epub, read_notebook, read_xml
from exl2_rag.retrieval.loaders.office import read_pptx, read_xlsx
from tests.retrieval.loaders.make_files import STRICT_WORD, docx, paragraph, zipped

STYLES = (
    '<w:style w:styleId="H1"><w:name w:val="heading 1"/></w:style>'
    '<w:style w:styleId="Own"><w:name w:val="My heading"/><w:basedOn w:val="H2"/></w:style>'
    '<w:style w:styleId="H2"><w:name w:val="Anything"/><w:pPr><w:outlineLvl w:val="1"/></w:pPr></w:style>'
    '<w:style w:styleId="Code"><w:name w:val="Source Code"/></w:style>'
    '<w:style w:styleId="Loop"><w:name w:val="x"/><w:basedOn w:val="Loop"/></w:style>'
)
NUMBERING = (
    '<w:abstractNum w:abstractNumId="7"><w:lvl><w:numFmt w:val="decimal"/></w:lvl>'
    '<w:lvl><w:numFmt w:val="bullet"/></w:lvl></w:abstractNum>'
    '<w:num w:numId="1"><w:abstractNumId w:val="7"/></w:num>'
)


def style(name: str) -> str:
    return f'<w:pStyle w:val="{name}"/>'


def number(level: int) -> str:
    return f'<w:numPr><w:ilvl w:val="{level}"/><w:numId w:val="1"/></w:numPr>'


def words(body: str, **parts: str) -> str:
    return read_docx(docx(body, **parts), LoadLimits().start()).pages[0]


def test_word_headings_come_from_style_names_outlines_and_their_bases() -> None:
    body = paragraph("One", style("H1")) + paragraph("Two", style("Own")) + paragraph("Three", style("Loop"))
    extracted = read_docx(docx(body, styles=STYLES), LoadLimits().start())
    assert extracted.pages[0] == "# One\n\n## Two\n\nThree"
    assert extracted.title == "One"


def test_word_lists_count_on_after_other_paragraphs() -> None:
    body = paragraph("a", number(0)) + paragraph("b", number(1)) + paragraph("text") + paragraph("c", number(0))
    assert words(body, numbering=NUMBERING) == "1. a\n  - b\n\ntext\n\n2. c"


def test_word_text_is_what_a_reader_sees() -> None:
    body = (
        "<w:p><w:r><w:t>Kept</w:t></w:r><w:r><w:rPr><w:vanish/></w:rPr><w:t>hidden</w:t></w:r>"
        "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del><w:ins><w:r><w:t> new</w:t></w:r></w:ins>"
        "<w:r><w:tab/><w:t>tab</w:t><w:br/><w:t>line</w:t><w:noBreakHyphen/><w:t>end</w:t></w:r></w:p>"
    )
    assert words(body) == "Kept new tab\nline-end"


def test_a_word_text_box_is_read_once() -> None:
    box = f"<w:txbxContent>{paragraph('in the box')}</w:txbxContent>"
    body = (
        "<w:p><w:r><w:t>before</w:t><mc:AlternateContent><mc:Choice>" + box + "</mc:Choice><mc:Fallback>" + box
    ) + "</mc:Fallback></mc:AlternateContent></w:r></w:p>"
    assert words(body) == "before\n\nin the box"


def test_word_tables_code_formulas_and_notes() -> None:
    def cell(text: str) -> str:
        return f"<w:tc>{paragraph(text)}</w:tc>"

    table = f"<w:tbl><w:tr>{cell('a')}{cell('b')}</w:tr><w:tr>{cell('1')}{cell('2')}</w:tr></w:tbl>"
    frame = f"<w:tbl><w:tr>{cell('framed')}</w:tr></w:tbl>"
    code = paragraph("x = 1", style("Code")) + paragraph("y = 2", style("Code"))
    fraction = (
        "<m:oMath><m:f><m:num><m:r><m:t>a+b</m:t></m:r></m:num><m:den><m:r><m:t>2</m:t></m:r></m:den></m:f></m:oMath>"
    )
    note = f"<w:footnote>{paragraph('A note.')}</w:footnote>"
    text = words(table + frame + code + f"<w:p>{fraction}</w:p>", styles=STYLES, footnotes=note)
    assert text == "| a | b |\n| 1 | 2 |\n\nframed\n\n```\nx = 1\ny = 2\n```\n\n(a+b)/2\n\nA note."


def test_the_strict_form_of_word_reads_alike() -> None:
    body = paragraph("One", style("H1"))
    assert read_docx(docx(body, namespace=STRICT_WORD, styles=STYLES), LoadLimits().start()).pages[0] == "# One"


def test_slides_are_pages_with_titles_tables_groups_and_notes() -> None:
    import pptx
    from pptx.util import Inches

    presentation = pptx.Presentation()
    first = presentation.slides.add_slide(presentation.slide_layouts[5])
    first.shapes.title.text = "Title one"
    box = first.shapes.add_textbox(Inches(1), Inches(4), Inches(3), Inches(1))
    box.text_frame.text = "lower"
    group = first.shapes.add_group_shape()
    group.shapes.add_textbox(Inches(1), Inches(2), Inches(3), Inches(1)).text_frame.text = "upper, in a group"
    second = presentation.slides.add_slide(presentation.slide_layouts[6])
    table = second.shapes.add_table(2, 2, Inches(1), Inches(1), Inches(4), Inches(1)).table
    for row in range(2):
        for column in range(2):
            table.cell(row, column).text = f"{row}{column}"
    second.notes_slide.notes_text_frame.text = "Say this."
    out = io.BytesIO()
    presentation.save(out)
    extracted = read_pptx(out.getvalue(), LoadLimits().start())
    assert extracted.paged
    assert extracted.pages == (
        "# Title one\n\nupper, in a group\n\nlower",
        "| 00 | 01 |\n| 10 | 11 |\n\nNotes:\nSay this.",
    )


def test_sheets_are_headed_tables_of_values() -> None:
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Costs"
    for row in ([None, "item", "price", "date"], [None, "tea", 2.5, datetime.date(2026, 1, 2)], [], [None, "sum", 10]):
        sheet.append(row)
    sheet["H50"] = True
    book.create_sheet("Empty")
    out = io.BytesIO()
    book.save(out)
    extracted = read_xlsx(out.getvalue(), LoadLimits().start())
    assert extracted.pages[0] == (
        "# Costs\n\n| item | price | date |\n| tea | 2.5 | 2026-01-02 |\n\n| sum | 10 |\n\nTRUE"
    )


def test_a_books_chapters_are_read_in_the_order_of_its_spine() -> None:
    package = (
        '<package><metadata><dc:title xmlns:dc="x">Book</dc:title></metadata><manifest>'
        '<item id="b" href="two%20b.xhtml"/><item id="a" href="one.xhtml"/></manifest>'
        '<spine><itemref idref="a"/><itemref idref="b"/><itemref idref="missing"/></spine></package>'
    )
    members = {
        "META-INF/container.xml": '<container><rootfiles><rootfile full-path="OPS/p.opf"/></rootfiles></container>',
        "OPS/p.opf": package,
        "OPS/one.xhtml": "<?xml version='1.0'?><html><body><h1>One</h1></body></html>",
        "OPS/two b.xhtml": "<html><body><p>Two</p></body></html>",
    }
    extracted = read_epub(zipped(members), LoadLimits().start())
    assert (extracted.title, extracted.pages) == ("Book", ("# One\n\nTwo",))


def test_xml_gives_a_paragraph_an_element_and_reads_html_inside_as_html() -> None:
    source = b"<rss><title>Feed</title><item><a>one</a><b><![CDATA[<p>two</p><script>x</script>]]></b></item></rss>"
    extracted = read_xml(source, LoadLimits().start())
    assert (extracted.title, extracted.pages[0]) == ("Feed", "# Feed\n\none\n\ntwo")


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [("plain", "Hello\nBob", "Hello\nBob"), ("html", "<p>Hello</p><script>x</script>", "Hello")],
)
def test_mail_has_its_head_body_and_the_names_of_attachments(kind, body, expected) -> None:
    source = (
        "From: a@b.c\nTo: d@e.f\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\nMIME-Version: 1.0\n"
        'Content-Type: multipart/mixed; boundary="X"\n\n--X\n'
        f"Content-Type: text/{kind}\n\n{body}\n--X\nContent-Type: application/pdf\n"
        'Content-Disposition: attachment; filename="bill.pdf"\n\nAAAA\n--X--\n'
    )
    extracted: Extracted = read_email(source.encode(), LoadLimits().start())
    assert extracted.title == "Grüße"
    assert extracted.pages[0] == f"From: a@b.c\nTo: d@e.f\n\n{expected}\n\nAttachments: bill.pdf"


def test_a_notebook_gives_its_text_and_code() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "wrapped\n", "text"]},
        {"cell_type": "code", "source": "x = 1", "outputs": ["secret"]},
        {"cell_type": "code", "source": ""},
    ]
    extracted = read_notebook(json.dumps({"cells": cells}).encode(), LoadLimits().start())
    assert extracted.pages[0] == "# Title\nwrapped text\n\n```\nx = 1\n```"

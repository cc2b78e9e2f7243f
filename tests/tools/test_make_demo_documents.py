"""The demo documents: enough of them, in every format, and the made ones agree with their sources."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pypdfium2
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = REPOSITORY / "examples" / "document_qa" / "documents"
SOURCES = REPOSITORY / "examples" / "document_qa" / "sources"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_documents", REPOSITORY / "tools/make_demo_documents.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TOOL = load_tool()


def letters(text: str) -> str:
    return re.sub(r"\s+", "", text)


def pdf_pages() -> list[str]:
    document = pypdfium2.PdfDocument(DOCUMENTS / "operations-manual.pdf")
    try:
        return [page.get_textpage().get_text_bounded() for page in document]
    finally:
        document.close()


def docx_text() -> str:
    import zipfile

    with zipfile.ZipFile(DOCUMENTS / "answers-handbook.docx") as archive:
        xml = archive.read("word/document.xml").decode()
    return re.sub(r"<[^>]+>", "", xml).replace("&quot;", '"').replace("&amp;", "&")


def test_documents_come_in_five_formats() -> None:
    assert {path.suffix for path in DOCUMENTS.iterdir()} == {".md", ".html", ".pdf", ".docx", ".txt"}


def test_documents_hold_twenty_pages_of_text() -> None:
    plain = [
        path.read_text(encoding="utf-8") for path in DOCUMENTS.iterdir() if path.suffix in {".md", ".html", ".txt"}
    ]
    words = sum(len(re.sub(r"<[^>]+>", " ", text).split()) for text in [*plain, *pdf_pages(), docx_text()])
    words_of_a_page = 450
    assert words >= 20 * words_of_a_page


@pytest.mark.parametrize("name", ["operations-manual", "answers-handbook"])
def test_made_document_holds_every_paragraph_of_its_source(name: str) -> None:
    parts = TOOL.parse_markdown((SOURCES / f"{name}.md").read_text(encoding="utf-8"))
    if name == "operations-manual":
        made = letters(" ".join(re.sub(r"Operations manual - page \d+", "", page) for page in pdf_pages()))
    else:
        made = letters(docx_text())
    for part in parts:
        if isinstance(part, TOOL.Paragraph | TOOL.Heading):
            assert letters(part.text) in made


def test_every_pdf_page_has_its_number_at_its_foot() -> None:
    pages = pdf_pages()
    assert len(pages) >= 5
    for number, text in enumerate(pages, start=1):
        assert text.rstrip().endswith(f"page {number}")


def test_parser_reads_headings_paragraphs_and_tables() -> None:
    parts = TOOL.parse_markdown("# Title\n\nTwo\nlines.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    assert parts == [TOOL.Heading(1, "Title"), TOOL.Paragraph("Two lines."), TOOL.Table((("a", "b"), ("1", "2")))]


@pytest.mark.parametrize("text", ["- a list", "some `code`", "**bold**", "a [link](there)", "# Head\nwith text"])
def test_parser_refuses_markdown_it_would_garble(text: str) -> None:
    with pytest.raises(ValueError, match="found"):
        TOOL.parse_markdown(text)


def test_making_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("reportlab", reason="only needed to make the documents")
    pytest.importorskip("docx", reason="only needed to make the documents")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        TOOL.make(documents=folder)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()

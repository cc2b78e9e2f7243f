"""Make the PDF and the DOCX among the demo documents from their Markdown sources.

    pip install reportlab python-docx
    python tools/make_demo_documents.py

Reads `examples/document_qa/sources/*.md` and writes into `examples/document_qa/documents`. The same sources and the
same library versions give the same bytes. Knows only the Markdown those sources use: headings, paragraphs and tables;
anything else is an error. The two libraries are needed here only, never at run time.
"""

from __future__ import annotations

import argparse
import datetime
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = REPOSITORY / "examples" / "document_qa" / "sources"
DOCUMENTS = REPOSITORY / "examples" / "document_qa" / "documents"
AUTHOR = "exl2-rag"
# Dates inside the files are fixed, so that making them again changes nothing.
MADE = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Heading:
    """A line that began with `level` hash signs."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text, its line breaks already spaces."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first row is the head."""

    rows: tuple[tuple[str, ...], ...]


Part = Heading | Paragraph | Table


def parse_markdown(text: str) -> list[Part]:
    """Split Markdown into headings, paragraphs and tables.

    Raises:
        ValueError: the text uses Markdown beyond that, which would end up in the output as raw marks.
    """
    parts: list[Part] = []
    for raw in re.split(r"\n\s*\n", text.strip()):
        if raw.startswith(("    ", "- ", "* ", "> ", "```")) or re.search(r"`|\*|\]\(", raw):
            raise ValueError(f"only headings, plain paragraphs and tables can be converted, found: {raw[:60]!r}")
        if match := re.fullmatch(r"(#{1,3}) (.+)", raw):
            parts.append(Heading(len(match[1]), match[2]))
        elif raw.startswith("|"):
            rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in raw.splitlines()]
            parts.append(Table((rows[0], *rows[2:])))  # rows[1] is the rule under the head
        elif raw.startswith("#"):
            raise ValueError(f"a heading must stand alone between empty lines, found: {raw[:60]!r}")
        else:
            parts.append(Paragraph(" ".join(raw.split())))
    return parts


def write_pdf(parts: list[Part], target: Path) -> None:
    """Write an A4 PDF with the title and the page number at the foot of every page."""
    from reportlab.lib import colors
    from reportlab.lib.pagesizes import A4
    from reportlab.lib.styles import ParagraphStyle, getSampleStyleSheet
    from reportlab.lib.units import cm
    from reportlab.platypus import BaseDocTemplate, Frame, PageTemplate, Spacer
    from reportlab.platypus import Paragraph as Text
    from reportlab.platypus import Table as Grid

    title = _title(parts)
    styles = getSampleStyleSheet()
    body = ParagraphStyle("body", parent=styles["BodyText"], fontSize=11, leading=15.5, spaceAfter=7)
    heads = {1: styles["Title"], 2: styles["Heading1"], 3: styles["Heading2"]}
    grid = [("GRID", (0, 0), (-1, -1), 0.5, colors.grey), ("BACKGROUND", (0, 0), (-1, 0), colors.whitesmoke)]

    flow: list[object] = []
    for part in parts:
        match part:
            case Heading(level, text):
                flow.append(Text(escape(text), heads[level]))
            case Paragraph(text):
                flow.append(Text(escape(text), body))
            case Table(rows):
                flow += [Spacer(0, 6), Grid([list(row) for row in rows], style=grid, repeatRows=1), Spacer(0, 12)]

    def foot(canvas: object, document: object) -> None:
        canvas.saveState()  # type: ignore[attr-defined]
        canvas.setFont("Helvetica", 9)  # type: ignore[attr-defined]
        page = document.page  # type: ignore[attr-defined]
        canvas.drawCentredString(A4[0] / 2, 1.2 * cm, f"{title} - page {page}")  # type: ignore[attr-defined]
        canvas.restoreState()  # type: ignore[attr-defined]

    template = BaseDocTemplate(str(target), pagesize=A4, title=title, author=AUTHOR, invariant=1)
    frame = Frame(2.3 * cm, 2.2 * cm, A4[0] - 4.6 * cm, A4[1] - 4.4 * cm)
    # At the end of a page, so that extracted text has the foot below the page's text and not above it.
    template.addPageTemplates(PageTemplate(frames=[frame], onPageEnd=foot))
    template.build(flow)


def write_docx(parts: list[Part], target: Path) -> None:
    """Write a DOCX with Word's own heading styles."""
    from docx import Document

    document = Document()
    for part in parts:
        match part:
            case Heading(level, text):
                document.add_heading(text, level=level - 1)  # level 0 is the document's title
            case Paragraph(text):
                document.add_paragraph(text)
            case Table(rows):
                table = document.add_table(rows=0, cols=len(rows[0]), style="Table Grid")
                for row in rows:
                    for cell, text in zip(table.add_row().cells, row, strict=True):
                        cell.text = text
    properties = document.core_properties
    properties.title = _title(parts)
    properties.author = AUTHOR
    properties.last_modified_by = AUTHOR
    properties.comments = ""
    properties.created = properties.modified = MADE.replace(tzinfo=None)
    document.save(str(target))
    _fix_zip_dates(target)


def _title(parts: list[Part]) -> str:
    first = parts[0]
    if not (isinstance(first, Heading) and first.level == 1):
        raise ValueError("a source must begin with its title, a line with one hash sign")
    return first.text


def _fix_zip_dates(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name, MADE.timetuple()[:6])
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)


WRITERS = {"operations-manual": (".pdf", write_pdf), "answers-handbook": (".docx", write_docx)}


def make(sources: Path = SOURCES, documents: Path = DOCUMENTS) -> list[Path]:
    """Write every generated document and return the paths."""
    made = []
    for name, (suffix, write) in WRITERS.items():
        parts = parse_markdown((sources / f"{name}.md").read_text(encoding="utf-8"))
        target = documents / f"{name}{suffix}"
        write(parts, target)
        made.append(target)
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the PDF and DOCX demo documents from their Markdown sources.")
    parser.add_argument("--into", type=Path, default=DOCUMENTS, help="folder to write to")
    for path in make(documents=parser.parse_args().into):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

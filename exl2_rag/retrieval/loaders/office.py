"""Word, PowerPoint and Excel files, by mammoth, python-pptx and openpyxl.

Those libraries find the words; what becomes of headings, lists, tables and slides is decided here and in `html_page`.
markitdown has the same three libraries behind it, but escapes and decorates the text, which then cannot be quoted as
the document has it, and gives no slide numbers.
"""

from __future__ import annotations

import datetime
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any, TypeVar

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval.loaders.container import open_container, read_member
from exl2_rag.retrieval.loaders.extracted import Budget, Extracted, broken
from exl2_rag.retrieval.loaders.formulas import linearise_formulas
from exl2_rag.retrieval.loaders.html_page import html_to_text
from exl2_rag.retrieval.loaders.tables import table_rows

DOCX_TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
PPTX_TYPE = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
XLSX_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"

_T = TypeVar("_T")
_STYLES = """
p[style-name='Title'] => h1:fresh
p[style-name='Source Code'] => pre:separator('\\n')
p[style-name='HTML Preformatted'] => pre:separator('\\n')
"""
_STRICT_NAMESPACES = (
    (
        b"http://purl.oclc.org/ooxml/wordprocessingml/main",
        b"http://schemas.openxmlformats.org/wordprocessingml/2006/main",
    ),
    (
        b"http://purl.oclc.org/ooxml/officeDocument/relationships",
        b"http://schemas.openxmlformats.org/officeDocument/2006/relationships",
    ),
)


def read_docx(data: bytes, budget: Budget) -> Extracted:
    """Text of a Word file: headings, lists, tables, text boxes, notes; formulas as linear text."""
    with open_container(data, budget) as container:
        title = _core_title(container)
        data = _prepare_docx(container, data)

    def convert() -> str:
        import mammoth  # type: ignore[import-untyped]

        result = mammoth.convert_to_html(
            BytesIO(data),
            convert_image=mammoth.images.img_element(lambda image: {"src": ""}),
            style_map=_STYLES,
            include_embedded_style_map=False,
        )
        return str(result.value)

    heading, text = html_to_text(_guarded(convert), budget)
    return Extracted((text,), DOCX_TYPE, "markdown", heading or title)


def read_pptx(data: bytes, budget: Budget) -> Extracted:
    """Text of a presentation, one page a slide: title as heading, text, tables, charts, notes."""
    with open_container(data, budget) as container:
        title = _core_title(container)

    def convert() -> tuple[str, ...]:
        import pptx

        slides = pptx.Presentation(BytesIO(data)).slides
        budget.check_pages(len(slides))
        return tuple(_slide_text(slide, budget) for slide in slides)

    return Extracted(_guarded(convert), PPTX_TYPE, "markdown", title, paged=True)


def read_xlsx(data: bytes, budget: Budget) -> Extracted:
    """Values of a workbook: a heading and a table for every sheet."""
    with open_container(data, budget) as container:
        title = _core_title(container)

    def convert() -> str:
        import openpyxl  # type: ignore[import-untyped]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # openpyxl warns of every feature it does not keep when saving
            workbook = openpyxl.load_workbook(BytesIO(data), read_only=True, data_only=True, keep_links=False)
            try:
                return "\n\n".join(text for sheet in workbook.worksheets if (text := _sheet_text(sheet, budget)))
            finally:
                workbook.close()

    return Extracted((_guarded(convert),), XLSX_TYPE, "markdown", title, headed=False)


def _guarded(convert: Callable[[], _T]) -> _T:
    """Whatever a parser throws at a damaged file becomes one DocumentError."""
    try:
        return convert()
    except DocumentError:
        raise
    except MemoryError as error:
        raise DocumentError("reading it takes more memory than there is", reason="too-large") from error
    except Exception as error:  # these libraries raise nearly anything on damaged files
        raise broken(f"{type(error).__name__}: {error}") from error


def _core_title(container: zipfile.ZipFile) -> str:
    if "docProps/core.xml" not in container.namelist():
        return ""
    found = re.search(rb"<dc:title[^>]*>([^<]{1,500})</dc:title>", read_member(container, "docProps/core.xml"))
    if found is None:
        return ""
    import html

    return html.unescape(found.group(1).decode("utf-8", errors="replace")).strip()


def _prepare_docx(container: zipfile.ZipFile, data: bytes) -> bytes:
    """The file as mammoth can read it: strict namespaces made transitional, formulas made text."""
    if "word/document.xml" not in container.namelist():
        raise broken("it holds no word/document.xml")
    body = read_member(container, "word/document.xml")
    strict = b"http://purl.oclc.org/ooxml/" in body
    if not strict and b"oMath" not in body:
        return data
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name in container.namelist():
            if not name.endswith((".xml", ".rels")):
                continue  # pictures and fonts are not read
            content = read_member(container, name)
            if strict:
                for old, new in _STRICT_NAMESPACES:
                    content = content.replace(old, new)
            if name in ("word/document.xml", "word/footnotes.xml", "word/endnotes.xml") and b"oMath" in content:
                content = _guarded(lambda content=content: linearise_formulas(content))  # type: ignore[misc]
            target.writestr(name, content)
    return out.getvalue()


def _slide_text(slide: Any, budget: Budget) -> str:
    title = slide.shapes.title
    blocks: list[str] = []
    if title is not None and title.has_text_frame and title.text_frame.text.strip():
        blocks.append("# " + " ".join(title.text_frame.text.split()))
    for shape in _shapes_in_reading_order(slide.shapes):
        if title is None or shape.shape_id != title.shape_id:
            blocks.extend(_shape_blocks(shape))
    if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
        notes = slide.notes_slide.notes_text_frame.text.strip()
        if notes:
            blocks.append("Notes:\n" + notes)
    text = "\n\n".join(block for block in blocks if block.strip())
    budget.spend_text(text)
    return text


def _shapes_in_reading_order(shapes: Any) -> Iterator[Any]:
    """Shapes from top to bottom, those of groups included, without recursion."""

    def placed(shape: Any) -> tuple[int, int]:
        return (shape.top or 0, shape.left or 0)

    stack = sorted(shapes, key=placed, reverse=True)
    while stack:
        shape = stack.pop()
        if hasattr(shape, "shapes"):
            stack.extend(sorted(shape.shapes, key=placed, reverse=True))
        else:
            yield shape


def _shape_blocks(shape: Any) -> Iterator[str]:
    if getattr(shape, "has_table", False):
        yield table_rows([[cell.text for cell in row.cells] for row in shape.table.rows])
    elif getattr(shape, "has_chart", False):
        yield _chart_text(shape.chart)
    elif shape.has_text_frame:
        yield "\n".join(
            "  " * paragraph.level + ("- " if paragraph.level else "") + " ".join(paragraph.text.split())
            for paragraph in shape.text_frame.paragraphs
            if paragraph.text.strip()
        )


def _chart_text(chart: Any) -> str:
    title = chart.chart_title.text_frame.text if chart.has_title and chart.chart_title.has_text_frame else "Chart"
    try:
        categories = [str(category) for category in chart.plots[0].categories]
        series = [(str(one.name), [str(value) for value in one.values]) for one in chart.series]
    except (ValueError, IndexError, AttributeError, NotImplementedError):  # chart types python-pptx does not know
        return str(title)
    rows = [["", *(name for name, _ in series)]]
    for index, category in enumerate(categories):
        rows.append([category, *(values[index] if index < len(values) else "" for _, values in series)])
    return f"{title}\n{table_rows(rows)}"


def _sheet_text(sheet: Any, budget: Budget) -> str:
    sheet.reset_dimensions()  # the file's own word for its size may be wrong or hostile
    tables: list[list[list[str]]] = [[]]
    for row in sheet.iter_rows(values_only=True):
        budget.spend_cells(len(row) + 1)
        cells = [_cell_text(value) for value in row]
        if any(cells):
            tables[-1].append(cells)
            budget.spend_text("".join(cells))
        elif tables[-1]:
            tables.append([])
    texts = [table_rows(table) for table in tables if table]
    return "\n\n".join([f"# {sheet.title}", *texts]) if texts else ""


def _cell_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        return f"{value:.15g}"
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(sep=" ")
    return " ".join(str(value).split())

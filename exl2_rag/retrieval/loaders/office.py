"""PowerPoint and Excel files, by python-pptx and openpyxl.

Those libraries find the words; what becomes of titles, tables and slides is decided here. markitdown has the same two
behind it, but gives no slide numbers and escapes the text, which then cannot be quoted as the document has it.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterator
from io import BytesIO
from typing import Any

from exl2_rag.retrieval.loaders.container import core_title, guarded, open_container
from exl2_rag.retrieval.loaders.extracted import Budget, Extracted
from exl2_rag.retrieval.loaders.tables import table_rows

PPTX_TYPE = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
XLSX_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"


def read_pptx(data: bytes, budget: Budget) -> Extracted:
    """Text of a presentation, one page a slide: title as heading, text, tables, charts, notes."""
    with open_container(data, budget) as container:
        title = core_title(container)

    def convert() -> tuple[str, ...]:
        import pptx

        slides = pptx.Presentation(BytesIO(data)).slides
        budget.check_pages(len(slides))
        return tuple(_slide_text(slide, budget) for slide in slides)

    return Extracted(guarded(convert), PPTX_TYPE, "markdown", title, paged=True)


def read_xlsx(data: bytes, budget: Budget) -> Extracted:
    """Values of a workbook: a heading and a table for every sheet."""
    with open_container(data, budget) as container:
        title = core_title(container)

    def convert() -> str:
        import openpyxl  # type: ignore[import-untyped]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # openpyxl warns of every feature it does not keep when saving
            workbook = openpyxl.load_workbook(BytesIO(data), read_only=True, data_only=True, keep_links=False)
            try:
                return "\n\n".join(text for sheet in workbook.worksheets if (text := _sheet_text(sheet, budget)))
            finally:
                workbook.close()

    return Extracted((guarded(convert),), XLSX_TYPE, "markdown", title, headed=False)


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

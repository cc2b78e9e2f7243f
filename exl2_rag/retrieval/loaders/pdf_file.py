"""PDF files as pages of text. pdfium reads characters and where they stand; `pdf_layout` makes paragraphs of them.

pypdf is asked only where pdfium cannot open the file or finds no text in it. Scanned pages without a text layer are
refused by name: nothing here recognises images.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from io import BytesIO
from typing import Any

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval.loaders.extracted import Budget, Extracted, broken
from exl2_rag.retrieval.loaders.pdf_layout import BROKEN_WORD, Line, Page, pages_to_text
from exl2_rag.retrieval.loaders.plain_text import unwrap_plain

MEDIA_TYPE = "application/pdf"
_PDFIUM_LOCK = threading.Lock()  # pdfium allows one caller at a time in a process
_HYPHEN_CODE = 2  # what pdfium gives for a hyphen at a line's end
_ENCRYPTED = "the PDF is encrypted and does not open without a password; save it without one"


def read_pdf(data: bytes, budget: Budget) -> Extracted:
    """Text of a PDF, one string a page.

    Raises:
        DocumentError: "encrypted", "broken", "no-text-layer", "too-large" or "too-slow".
    """
    if b"%PDF-" not in data[:1024]:
        raise broken("it does not begin as a PDF does")
    try:
        with _PDFIUM_LOCK:
            extracted = _read_with_pdfium(data, budget)
    except _PdfiumError as failure:
        extracted = _read_with_pypdf(data, budget, str(failure))
    else:
        if not any(page.strip() for page in extracted.pages):
            extracted = _read_with_pypdf(data, budget, "no text found")
    if not any(page.strip() for page in extracted.pages):
        raise DocumentError(
            f"none of the {len(extracted.pages)} page(s) has a text layer (scanned?); run text recognition on it first",
            reason="no-text-layer",
        )
    return extracted


class _PdfiumError(Exception):
    """pdfium could not read the file for another reason than a password."""


def _read_with_pdfium(data: bytes, budget: Budget) -> Extracted:
    import pypdfium2  # type: ignore[import-untyped]
    from pypdfium2 import raw

    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if raw.FPDF_GetLastError() == raw.FPDF_ERR_PASSWORD or "password" in str(error).lower():
            raise DocumentError(_ENCRYPTED, reason="encrypted") from error
        raise _PdfiumError(str(error)) from error
    try:
        budget.check_pages(len(pdf))
        pages: list[Page] = []
        for index in range(len(pdf)):
            try:
                page = pdf[index]
                textpage = page.get_textpage()
            except pypdfium2.PdfiumError as error:
                raise _PdfiumError(f"page {index + 1}: {error}") from error
            try:
                lines = tuple(_lines(raw, textpage.raw))
                pages.append(Page(lines, page.get_height()))
            finally:
                textpage.close()
                page.close()
            budget.spend_text("".join(line.text for line in lines))
        title = str(pdf.get_metadata_value("Title") or "")
    finally:
        pdf.close()
    texts, heading = pages_to_text(pages)
    known = title.strip() and title.strip().lower() in " ".join("\n".join(texts[:2]).lower().split())
    return Extracted(tuple(texts), MEDIA_TYPE, "markdown", title if known else heading, paged=True)


def _lines(raw: Any, textpage: Any) -> Iterator[Line]:
    """Lines as pdfium cuts them, with baseline, height and horizontal extent in points."""
    text: list[str] = []
    first = last = -1
    for index in range(raw.FPDFText_CountChars(textpage)):
        code = raw.FPDFText_GetUnicode(textpage, index)
        if code in (10, 13, _HYPHEN_CODE):
            if code == _HYPHEN_CODE:  # pdfium gives no line break after it
                text.append(BROKEN_WORD)
            if text:
                yield _line(raw, textpage, "".join(text), first, last)
            text, first = [], -1
            continue
        if code == 0 or 0xD800 <= code < 0xE000:
            code = 0xFFFD
        text.append(chr(code))
        if not chr(code).isspace() and not raw.FPDFText_IsGenerated(textpage, index):
            first = index if first < 0 else first
            last = index
    if text:
        yield _line(raw, textpage, "".join(text), first, last)


def _line(raw: Any, textpage: Any, text: str, first: int, last: int) -> Line:
    if first < 0:
        return Line(text.strip(), 0.0, 0.0, 0.0, 0.0)
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    x, baseline = ctypes.c_double(), ctypes.c_double()
    raw.FPDFText_GetCharOrigin(textpage, first, x, baseline)
    raw.FPDFText_GetCharBox(textpage, first, left, right, bottom, top)
    start = left.value
    raw.FPDFText_GetCharBox(textpage, last, left, right, bottom, top)
    return Line(text.strip(), start, right.value, baseline.value, raw.FPDFText_GetFontSize(textpage, first))


def _read_with_pypdf(data: bytes, budget: Budget, why: str) -> Extracted:
    import logging

    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it logs every oddity of a file it still can read
    try:
        reader = PdfReader(BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError(_ENCRYPTED, reason="encrypted")
        budget.check_pages(len(reader.pages))
        pages: list[str] = []
        for page in reader.pages:
            text = unwrap_plain(page.extract_text())
            budget.spend_text(text)
            pages.append(text)
    except DocumentError:
        raise
    except (PyPdfError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OSError) as error:
        raise broken(f"pdfium: {why}; pypdf: {type(error).__name__}: {error}") from error
    return Extracted(tuple(pages), MEDIA_TYPE, "plain", "", paged=True)

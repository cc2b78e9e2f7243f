"""What a loader hands over, and the bounds no file may break. Knows no file format."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval.document import Markup


@dataclass(frozen=True, slots=True)
class Extracted:
    """Text taken out of one file, not yet cleaned.

    Attributes:
        pages: the text, one string a page; a single string if the format has no pages.
        media_type: of the file.
        markup: how the text is structured.
        title: what the file itself gives as its title; empty if it gives none.
        headed: may the first heading or line serve as a title, if the file gives none?
        paged: do `pages` have numbers a reader would know?
    """

    pages: tuple[str, ...]
    media_type: str
    markup: Markup = "plain"
    title: str = ""
    headed: bool = True
    paged: bool = False


@dataclass(frozen=True, slots=True)
class LoadLimits:
    """Bounds for one file. A file that breaks one is refused as a whole, never cut.

    Attributes:
        file_bytes: size on disk.
        unpacked_bytes: sum of the XML members of a zip container (docx, pptx, xlsx, epub), or size of an HTML page.
        tags: tags of an HTML or XML file; a tree of more takes minutes to build.
        text_chars: characters of extracted text.
        pages: pages of a PDF, slides, sheets.
        cells: cells of one spreadsheet file.
        seconds: time between two looks at the clock is not bounded, the sum of all is.
    """

    file_bytes: int = 128 * 2**20
    unpacked_bytes: int = 64 * 2**20
    tags: int = 500_000
    text_chars: int = 20_000_000
    pages: int = 20_000
    cells: int = 2_000_000
    seconds: float = 120.0

    def start(self) -> Budget:
        """Begin to count for one file."""
        return Budget(self)


@dataclass(slots=True)
class Budget:
    """What one file has used of its limits."""

    limits: LoadLimits
    _chars: int = 0
    _cells: int = 0
    _deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.limits.seconds

    def spend_text(self, text: str) -> None:
        """Count extracted text, and look at the clock.

        Raises:
            DocumentError: too much text ("too-large") or time is up ("too-slow").
        """
        self._chars += len(text)
        if self._chars > self.limits.text_chars:
            raise too_large(f"more than {self.limits.text_chars:,} characters of text")
        self.check_time()

    def spend_cells(self, count: int) -> None:
        """Count spreadsheet cells, and look at the clock."""
        self._cells += count
        if self._cells > self.limits.cells:
            raise too_large(f"more than {self.limits.cells:,} cells")
        self.check_time()

    def check_pages(self, count: int) -> None:
        """Refuse a file of too many pages."""
        if count > self.limits.pages:
            raise too_large(f"{count:,} pages, more than {self.limits.pages:,}")

    def check_unpacked(self, size_bytes: int) -> None:
        """Refuse a file that is too large once unpacked."""
        if size_bytes > self.limits.unpacked_bytes:
            raise too_large(
                f"{size_bytes:,} bytes unpacked, more than {self.limits.unpacked_bytes:,}; perhaps a zip bomb"
            )

    def check_markup(self, markup: bytes | str) -> None:
        """Refuse HTML or XML whose tree would take too long or too much memory to build."""
        self.check_unpacked(len(markup))
        count = markup.count("<") if isinstance(markup, str) else markup.count(b"<")
        if count > 2 * self.limits.tags:  # an element has two
            raise too_large(f"about {count // 2:,} tags, more than {self.limits.tags:,}")

    def check_time(self) -> None:
        """Refuse a file that takes too long."""
        if time.monotonic() > self._deadline:
            raise DocumentError(
                f"reading took longer than {self.limits.seconds:g} seconds; split the file or convert it to text",
                reason="too-slow",
            )


def too_large(what: str) -> DocumentError:
    """The error for a file beyond its limits."""
    return DocumentError(f"the file is too large: {what}; split it or convert it to text", reason="too-large")


def broken(what: str) -> DocumentError:
    """The error for a file that is not what its name says."""
    return DocumentError(f"the file is damaged or not what its name says: {what}", reason="broken")

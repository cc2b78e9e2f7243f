"""One file in, one cleaned `Document` out, or a `DocumentError` that says which kind of trouble it is.

The reasons, so that they can be counted: "unsupported", "encrypted", "broken", "empty", "no-text-layer", "too-large",
"too-slow", "unreadable" (no permission, vanished, not a plain file).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from pathlib import Path

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval.cleaning import clean_text, clean_title
from exl2_rag.retrieval.document import Document, Markup
from exl2_rag.retrieval.loaders.container import guarded
from exl2_rag.retrieval.loaders.docx_file import read_docx
from exl2_rag.retrieval.loaders.extracted import Budget, Extracted, LoadLimits, too_large
from exl2_rag.retrieval.loaders.markup_files import read_email, read_epub, read_html, read_notebook, read_xml
from exl2_rag.retrieval.loaders.office import read_pptx, read_xlsx
from exl2_rag.retrieval.loaders.pdf_file import read_pdf
from exl2_rag.retrieval.loaders.plain_text import (
    decode_text,
    read_asciidoc,
    read_markdown,
    read_restructured,
    read_subtitles,
    unwrap_plain,
)
from exl2_rag.retrieval.loaders.tables import read_csv

LOADING_VERSION = 1

_Reader = Callable[[bytes, Budget], Extracted]

_MARKDOWN_HEADING = re.compile(r"^# +(\S.*?)[ #]*$", re.MULTILINE)
_TITLE_CHARS = 100

_CODE_NAMES = frozenset(["makefile", "dockerfile", "cmakelists.txt"])
_CODE_SUFFIXES = """
    .py .pyi .js .mjs .cjs .ts .tsx .jsx .java .kt .kts .scala .go .rs .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .cs .fs
    .swift .m .mm .rb .php .pl .pm .lua .r .jl .hs .ml .ex .exs .erl .clj .lisp .el .vim .sh .bash .zsh .fish .ps1
    .bat .sql .css .scss .less .json .jsonl .json5 .yaml .yml .toml .ini .cfg .conf .env .properties .proto .graphql
    .cmake .mk .dockerfile .tf .gradle .diff .patch .tex .bib .vue .svelte
"""
_OLD_FORMATS = {
    ".doc": "docx",
    ".dot": "docx",
    ".xls": "xlsx",
    ".ppt": "pptx",
    ".msg": "eml",
    ".rtf": "docx",
    ".odt": "docx",
    ".ods": "xlsx",
    ".odp": "pptx",
}


def load_document(
    path: str | Path, *, root: str | Path, delimiter: str = "", limits: LoadLimits | None = None
) -> Document:
    """Read one file.

    Args:
        path: the file.
        root: directory the document's `source` is relative to; `path` must be inside.
        delimiter: the index's secret, which the text must not hold.
        limits: bounds; a file beyond one is refused, never cut.

    Raises:
        DocumentError: the file cannot be turned into text; `.reason` says why in one word.
    """
    path, root = Path(path), Path(root)
    limits = limits or LoadLimits()
    try:
        source = path.relative_to(root).as_posix()
    except ValueError as error:
        raise DocumentError(f"{path} is not inside {root}", reason="unreadable") from error
    data = _read_bytes(path, limits)
    try:
        reader, budget = _reader_for(path), limits.start()
        extracted = guarded(lambda: reader(data, budget))
    except DocumentError as error:
        raise DocumentError(f"{source}: {error}", reason=error.reason) from error
    return make_document(source, extracted, delimiter=delimiter)


def make_document(source: str, extracted: Extracted, *, delimiter: str = "") -> Document:
    """Clean what a loader took out of a file, join its pages and settle the title.

    Raises:
        DocumentError: nothing is left ("empty").
    """
    pieces: list[str] = []
    starts: list[int] = []
    length = 0
    for page in extracted.pages:
        cleaned = clean_text(page, delimiter=delimiter)
        if cleaned and length:
            joint = " " if _goes_on(pieces[-1], cleaned) else "\n\n"
            pieces.append(joint)
            length += len(joint)
        starts.append(length)
        if cleaned:
            pieces.append(cleaned)
            length += len(cleaned)
    text = "".join(pieces)
    if not text.strip():
        raise DocumentError(f"{source}: there is no text in it", reason="empty")
    title = (
        clean_title(extracted.title, delimiter=delimiter)
        or clean_title(_title_of(text, extracted.markup) if extracted.headed else "", delimiter=delimiter)
        or clean_title(re.sub(r"[_\s]+", " ", Path(source).stem), delimiter=delimiter)
        or "Untitled"
    )
    return Document(
        source=source,
        title=title,
        text=text,
        media_type=extracted.media_type,
        page_starts=tuple(starts) if extracted.paged else (),
        markup=extracted.markup,
    )


def _goes_on(page: str, following: str) -> bool:
    """Does a sentence that begins on one page go on on the next?"""
    return page[-1] not in ".!?:;。！？|`" and following[0].islower()


def _title_of(text: str, markup: Markup) -> str:
    """The first level-one heading, or a first line that stands alone and reads like a title."""
    if markup == "markdown":
        found = _MARKDOWN_HEADING.search(text)
        return found.group(1) if found else ""
    if markup == "code":
        return ""
    first, _, rest = text.partition("\n")
    alone = rest.startswith("\n") and rest.strip() != ""
    plain = 0 < len(first) <= _TITLE_CHARS and first[-1] not in ".!?,;:" and re.search(r"[^\W\d_]{2}", first)
    return first if alone and plain else ""


def _read_bytes(path: Path, limits: LoadLimits) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DocumentError(f"{path} is not a plain file", reason="unreadable")
        if status.st_size > limits.file_bytes:
            raise too_large(f"{path} has {status.st_size:,} bytes, more than {limits.file_bytes:,}")
        with path.open("rb") as stream:
            data = stream.read(limits.file_bytes + 1)
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}", reason="unreadable") from error
    if len(data) > limits.file_bytes:
        raise too_large(f"{path} grew beyond {limits.file_bytes:,} bytes while it was read")
    if not data.strip():
        raise DocumentError(f"{path} is empty", reason="empty")
    return data


def _reader_for(path: Path) -> _Reader:
    suffix = path.suffix.lower()
    if suffix in _READERS:
        return _READERS[suffix]
    if suffix in _OLD_FORMATS:
        raise DocumentError(
            f"{suffix} files are not read; save it as .{_OLD_FORMATS[suffix]} or PDF", reason="unsupported"
        )
    if (suffix and suffix in _CODE_SUFFIXES.split()) or path.name.lower() in _CODE_NAMES:
        return _read_code
    return _read_plain  # refuses what is not text


def _read_plain(data: bytes, budget: Budget) -> Extracted:
    text = unwrap_plain(decode_text(data))
    budget.spend_text(text)
    return Extracted((text,), "text/plain", "plain")


def _read_code(data: bytes, budget: Budget) -> Extracted:
    text = decode_text(data)
    budget.spend_text(text)
    return Extracted((text,), "text/x-source", "code")


def _read_markdown(data: bytes, budget: Budget) -> Extracted:
    title, text = read_markdown(decode_text(data))
    budget.spend_text(text)
    return Extracted((text,), "text/markdown", "markdown", title)


def _read_csv(data: bytes, budget: Budget) -> Extracted:
    return Extracted((read_csv(decode_text(data), budget),), "text/csv", "markdown", headed=False)


def _text_reader(convert: Callable[[str], str], media_type: str, markup: Markup) -> _Reader:
    def read(data: bytes, budget: Budget) -> Extracted:
        text = convert(decode_text(data))
        budget.spend_text(text)
        return Extracted((text,), media_type, markup)

    return read


_READERS: dict[str, _Reader] = {
    **dict.fromkeys((".md", ".markdown", ".mdown", ".mkd"), _read_markdown),
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
    **dict.fromkeys((".xml", ".rss", ".atom"), read_xml),
    **dict.fromkeys((".docx", ".docm", ".dotx"), read_docx),
    **dict.fromkeys((".pptx", ".pptm", ".ppsx"), read_pptx),
    **dict.fromkeys((".xlsx", ".xlsm", ".xltx"), read_xlsx),
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    **dict.fromkeys((".rst", ".rest"), _text_reader(read_restructured, "text/x-rst", "markdown")),
    **dict.fromkeys((".adoc", ".asciidoc", ".asc"), _text_reader(read_asciidoc, "text/asciidoc", "markdown")),
    **dict.fromkeys((".vtt", ".srt"), _text_reader(read_subtitles, "text/vtt", "plain")),
    ".pdf": read_pdf,
    ".epub": read_epub,
    ".eml": read_email,
    ".ipynb": read_notebook,
}

"""Cut a document into chunks the embedder can take whole.

Structure first: a chunk never crosses a heading, nor a page unless a sentence does. Within that, a paragraph is the
natural chunk; short ones are joined to their neighbours, long ones are cut at lines, then sentences, then words, then
characters. No overlap.

    document.text   # Title ¶ A paragraph. ¶ Short. ¶ Short too. ¶ ## Section ¶ A very long paragraph ...
    chunks                    [----------]   [----------------]               [------------][------] ...

A heading line is carried by the `heading` of the chunks below it and not repeated in their text. One that nothing
follows, or that is too long to carry, is text like any other: nothing gets lost.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from exl2_rag.errors import TextTooLongError
from exl2_rag.retrieval.document import Document
from exl2_rag.retrieval.sentences import split_sentences

CHUNKING_VERSION = 1

_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*?)[ \t]*(?:[ \t]#+)?[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_WORD = re.compile(r"\S+")
_HEADING_SEPARATOR = " > "
_MAX_HEADING_CHARS = 160
_MAX_CHARS_PER_TOKEN = 10  # some tokenizers make one token of any long word; a chunk is bounded in characters too
_JOIN_BELOW = 3  # paragraphs are joined while they are shorter than a third of the limit

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """Where a chunk lies in its document, before it has an id.

    Attributes:
        start, end: offsets in the document's text.
        heading: headings above it, outermost first, joined by " > ".
        page: page it begins on, or None.
    """

    start: int
    end: int
    heading: str
    page: int | None


def embedded_text(title: str, heading: str, text: str, count_tokens: Callable[[str], int], limit: int) -> str:
    """What is embedded for a chunk: title, heading and text, a line each.

    A heading, then a title, that together take more than half of `limit` tokens are left out: they are there to help
    the text, not to displace it. The text itself is never cut.
    """
    for head in (f"{title}\n{heading}\n" if heading else f"{title}\n", f"{title}\n", ""):
        if not head or count_tokens(head) <= limit // 2:
            return head + text
    raise AssertionError("the empty head always fits")


def chunk_id_of(source: str, title: str, heading: str, text: str, occurrence: int) -> str:
    """Stable id of a chunk: a hash of what is embedded, its file, and the how-manieth such chunk of the file it is."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (source, title, heading, text, str(occurrence)):
        encoded = part.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def split_document(document: Document, count_tokens: Callable[[str], int], limit: int) -> list[ChunkSpan]:
    """Cut `document` into chunks of at most `limit` tokens, title and heading included.

    Args:
        document: cleaned document.
        count_tokens: the embedder's own count, special tokens not included.
        limit: tokens at most, at least 16.

    Returns:
        Chunks in order, not overlapping, without white space at their ends. Together they hold every visible character
        of the text, but for heading lines that are some chunk's `heading` (or the document's title).
    """
    spans: list[ChunkSpan] = []
    for section_start, section_end, heading in _sections(document):
        head = embedded_text(document.title, heading, "", count_tokens, limit)
        cutter = _Cutter(document, count_tokens, head, limit)
        for start, end in cutter.cut(section_start, section_end):
            spans.append(ChunkSpan(start, end, heading, document.page_at(start)))
    return spans


@dataclass(frozen=True, slots=True)
class _Section:
    """Text between two heading lines, and which heading lines (by index) stand above it."""

    start: int
    end: int
    path: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _HeadingLine:
    start: int
    end: int
    level: int
    text: str


def _sections(document: Document) -> Iterator[tuple[int, int, str]]:
    """(start, end, heading) of all stretches to be chunked, in order; see the module's text for heading lines."""
    text = document.text
    headings = list(_heading_lines(document))
    sections = [_Section(0, headings[0].start if headings else len(text), ())]
    open_path: list[int] = []
    for index, line in enumerate(headings):
        open_path = [above for above in open_path if headings[above].level < line.level] + [index]
        path = list(open_path)
        while len(_joined(path, headings, document.title)) > _MAX_HEADING_CHARS and len(path) > 1:
            path.pop(0)  # keep the nearest
        end = headings[index + 1].start if index + 1 < len(headings) else len(text)
        sections.append(_Section(line.end, end, tuple(path)))
    filled = [bool(text[section.start : section.end].strip()) for section in sections]
    carried = {
        index
        for section, has_text in zip(sections, filled, strict=True)
        for index in section.path
        if has_text and len(headings[index].text) <= _MAX_HEADING_CHARS
    }
    if any(filled):  # every chunk carries the title
        carried.update(index for index, line in enumerate(headings) if line.text == document.title)
    borders = sorted({start for start in document.page_starts if text.endswith("\n\n", 0, start)})
    for section, has_text in zip(sections, filled, strict=True):
        own = section.path[-1] if section.path else -1
        start = section.start
        path = list(section.path)
        if own >= 0 and own not in carried:
            start = headings[own].start
            path.remove(own)
        elif not has_text:
            continue
        heading = _joined(path, headings, document.title)
        for piece_start, piece_end in _cut_at(start, section.end, borders):
            yield piece_start, piece_end, heading


def _joined(path: Sequence[int], headings: Sequence[_HeadingLine], title: str) -> str:
    names = [headings[index].text for index in path]
    return _HEADING_SEPARATOR.join(name for place, name in enumerate(names) if place or name != title)


def _cut_at(start: int, end: int, borders: Sequence[int]) -> Iterator[Span]:
    for border in borders[bisect_right(borders, start) : bisect_left(borders, end)]:
        yield start, border
        start = border
    yield start, end


def _heading_lines(document: Document) -> Iterator[_HeadingLine]:
    text = document.text
    if document.markup == "code":
        return
    if document.markup == "plain":
        first = len(text) - len(text.lstrip())
        end = text.find("\n", first) if "\n" in text[first:] else len(text)
        if text[first:end].strip() == document.title:
            yield _HeadingLine(first, end, 1, document.title)
        return
    fence = ""
    position = 0
    for line in text.split("\n"):
        start, position = position, position + len(line) + 1
        marker = _FENCE.match(line)
        if fence:
            if marker and marker.group(1).startswith(fence):
                fence = ""
        elif marker:
            fence = marker.group(1)
        elif found := _HEADING.match(line):
            yield _HeadingLine(start, start + len(line), len(found.group(1)), found.group(2))


def _paragraphs(text: str, start: int, end: int, *, fenced: bool) -> Iterator[Span]:
    """Spans between blank lines; with `fenced`, blank lines inside a Markdown fence do not count."""
    opened = -1  # where the paragraph in progress begins
    last = start
    fence = ""
    position = start
    for line in text[start:end].split("\n"):
        line_start, position = position, position + len(line) + 1
        marker = _FENCE.match(line) if fenced else None
        if line.strip():
            opened = line_start if opened < 0 else opened
            last = line_start + len(line)
        elif opened >= 0 and not fence:
            yield opened, last
            opened = -1
        if marker and not fence:
            fence = marker.group(1)
        elif marker and marker.group(1).startswith(fence):
            fence = ""
    if opened >= 0:
        yield opened, last


class _Cutter:
    """Cuts one section. Counts tokens of small pieces, adds up, and counts exactly where the sum is near the limit."""

    def __init__(self, document: Document, count_tokens: Callable[[str], int], head: str, limit: int) -> None:
        self._text = document.text
        self._markup = document.markup
        self._count_tokens = count_tokens
        self._head = head
        self._limit = limit
        self._room = limit - count_tokens(head)
        self._levels: tuple[Callable[[int, int], Iterable[Span]], ...] = (
            self._lines,
            self._sentences,
            self._words,
            self._characters,
        )

    def cut(self, start: int, end: int) -> Iterator[Span]:
        """Chunks of [start, end), each within the limit."""
        current: Span | None = None
        for paragraph in _paragraphs(self._text, start, end, fenced=self._markup == "markdown"):
            for piece in self._fitting(paragraph, 0):
                if current is not None and self._joins(current, piece):
                    current = (current[0], piece[1])
                    continue
                if current is not None:
                    yield self._trimmed(current)
                current = piece
        if current is not None:
            yield self._trimmed(current)

    def _joins(self, current: Span, piece: Span) -> bool:
        small = self._limit // _JOIN_BELOW
        wanted = self._markup == "code" or self._tokens(current) < small or self._tokens(piece) < small
        return wanted and self._fits((current[0], piece[1]))

    def _fitting(self, span: Span, level: int) -> Iterator[Span]:
        """`span` itself if it fits, else runs of its lines (sentences, words, characters) that do."""
        if self._fits(span):
            yield span
            return
        if level == len(self._levels):
            raise TextTooLongError(
                f"one character takes more than the {self._room} tokens that {self._limit} leave beside title and "
                "heading; raise chunk_tokens or use another embedder"
            )
        total = self._tokens(span)
        parts = -(-total // self._room)
        target = total / parts  # runs of about equal length, rather than full ones and a scrap
        current: Span | None = None
        size = 0
        for unit in self._levels[level](*span):
            unit_size = self._tokens(unit)
            if current is not None and size < target and self._fits((current[0], unit[1]), size + unit_size):
                current = (current[0], unit[1])
                size += unit_size
                continue
            if current is not None:
                yield current
                current = None
            if self._fits(unit, unit_size):
                current, size = unit, unit_size
            else:
                yield from self._fitting(unit, level + 1)
        if current is not None:
            yield current

    def _tokens(self, span: Span) -> int:
        return self._count_tokens(self._text[span[0] : span[1]])

    def _fits(self, span: Span, estimate: int | None = None) -> bool:
        """Is the embedded text within the limit? An estimate far below it spares the exact count."""
        if span[1] - span[0] > self._limit * _MAX_CHARS_PER_TOKEN:
            return False
        if estimate is not None and estimate < 0.5 * self._room:
            return True
        return self._count_tokens(self._head + self._text[span[0] : span[1]]) <= self._limit

    def _trimmed(self, span: Span) -> Span:
        piece = self._text[span[0] : span[1]]
        return span[0] + len(piece) - len(piece.lstrip()), span[1] - len(piece) + len(piece.rstrip())

    def _lines(self, start: int, end: int) -> Iterator[Span]:
        position = start
        for line in self._text[start:end].split("\n"):
            if line.strip():
                yield position, position + len(line)
            position += len(line) + 1

    def _sentences(self, start: int, end: int) -> Iterator[Span]:
        for first, last in split_sentences(self._text[start:end]):
            yield start + first, start + last

    def _words(self, start: int, end: int) -> Iterator[Span]:
        for word in _WORD.finditer(self._text, start, end):
            yield word.span()

    def _characters(self, start: int, end: int) -> Iterator[Span]:
        """Pieces of a word without end, each as long as fits."""
        while start < end:
            size = min(end - start, self._limit * _MAX_CHARS_PER_TOKEN)
            while size > 1 and not self._fits((start, start + size)):
                size //= 2
            yield start, start + size
            start += size

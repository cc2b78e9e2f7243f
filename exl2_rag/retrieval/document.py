"""What retrieval talks about: a document, a chunk of it, a chunk with a score. Plain frozen data.

Nothing here reads files, counts tokens or knows how a chunk was found. Offsets always count characters of the cleaned
`Document.text`, so a chunk, a quote and a highlight in a viewer all speak of the same place.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

Markup = Literal["plain", "markdown", "code"]


@dataclass(frozen=True, slots=True)
class Document:
    """One file as cleaned text.

    Attributes:
        source: path relative to the indexed directory, with forward slashes; unique within an index.
        title: one line, never empty.
        text: the cleaned text all offsets refer to.
        media_type: of the original file, for example "application/pdf".
        page_starts: offset in `text` where each page (PDF page, slide) begins, ascending, the first is 0; empty if the
            format has no pages.
        markup: how `text` is structured: "markdown" has headings, lists, tables and fences, "code" is left as it was.
    """

    source: str
    title: str
    text: str
    media_type: str
    page_starts: tuple[int, ...] = ()
    markup: Markup = "plain"

    def page_at(self, offset: int) -> int | None:
        """Number (from 1) of the page that holds the character at `offset`; None if the document has no pages."""
        if not self.page_starts:
            return None
        return max(1, bisect_right(self.page_starts, offset))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of one document's text, small enough for the embedder.

    Attributes:
        chunk_id: hash of source, title, heading and text; the same text in the same file keeps it across re-indexing.
        label: short and stable name for prompts, such as "d17"; never given to another chunk of the index.
        source: the document's `source`.
        title: the document's title.
        heading: headings above the chunk, outermost first, joined by " > "; empty if there are none.
        text: exactly `document.text[start:end]`.
        start: first character in the document's text.
        end: one past the last character.
        page: page the chunk begins on, from 1; None if the document has no pages.
    """

    chunk_id: str
    label: str
    source: str
    title: str
    heading: str
    text: str
    start: int
    end: int
    page: int | None


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """A chunk found for a question. A higher score is better; scores of different questions do not compare."""

    chunk: Chunk
    score: float

"""From lines with positions to paragraphs: what a PDF leaves to the eye. Knows no PDF library.

Running heads and feet are dropped, lines of a paragraph joined, words broken at a line's end mended, larger type
becomes a heading. All of it by the page's own measures (usual line distance, usual type size); nothing is in points.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

BROKEN_WORD = "\ufffe"  # ends a line whose last word goes on in the next
_TERMINAL = re.compile(r"[.!?:;。！？][\"'”’»)\]]*$")
_LIST_MARKER = re.compile(r"(?:[-*•‣◦▪●–—]|\(?\d{1,3}[.)]|\(?[a-zA-Z][.)])\s")
_LABEL = re.compile(r"[A-Z][\w/()&,. ]{1,40}: ")
_PAGE_NUMBER = re.compile(r"(?:page|seite|pág\.|p\.) ?# ?(?:(?:of|/|von|de) ?#)?")
_EDGE_LINES = 3  # lines at the top and at the bottom of a page that may be running heads
_MARGIN = 0.14  # share of the page's height in which running heads stand
_MAX_HEADING_CHARS = 150


@dataclass(frozen=True, slots=True)
class Line:
    """One line of type, in points from the page's lower left corner."""

    text: str
    left: float
    right: float
    baseline: float
    size: float


@dataclass(frozen=True, slots=True)
class Page:
    """A page's lines in reading order."""

    lines: tuple[Line, ...]
    height: float


def pages_to_text(pages: Sequence[Page]) -> tuple[list[str], str]:
    """Text of each page with Markdown headings.

    Returns:
        (texts, title): one text a page, and the largest heading of the first page, empty if it has none.
    """
    running = _running_lines(pages)
    rows = [
        _join_fragments(line for line in page.lines if line.text and not _is_running(_zone_key(line, page), running))
        for page in pages
    ]
    sizes = _heading_sizes(rows)
    texts = [_page_text(lines, sizes) for lines in rows]
    mended = _mend_words(texts)
    title = ""
    if mended and sizes:
        first = re.search(rf"^#{{1,{len(sizes)}}} (.+)$", mended[0], re.MULTILINE)
        top = re.search(r"^# (.+)$", mended[0], re.MULTILINE) or first
        title = top.group(1) if top else ""
    return mended, title


def _zone_key(line: Line, page: Page) -> tuple[str, str]:
    """(zone, text with its numbers blotted out); the zone is "" in the middle of the page."""
    zone = ""
    if page.height > 0:
        place = line.baseline / page.height
        zone = "top" if place > 1 - _MARGIN else "bottom" if place < _MARGIN else ""
    return zone, re.sub(r"\d+|\b[ivxlc]+\b", "#", line.text.lower())


def _is_running(key: tuple[str, str], running: frozenset[tuple[str, str]]) -> bool:
    zone, blotted = key
    return key in running or (zone != "" and _PAGE_NUMBER.fullmatch(blotted) is not None)


def _running_lines(pages: Sequence[Page]) -> frozenset[tuple[str, str]]:
    """Lines that stand in the same margin of most pages."""
    if len(pages) < 2:
        return frozenset()
    counts: Counter[tuple[str, str]] = Counter()
    for page in pages:
        ordered = sorted((line for line in page.lines if line.text), key=lambda line: line.baseline)
        edge = {*ordered[:_EDGE_LINES], *ordered[-_EDGE_LINES:]}
        counts.update({key for line in edge if (key := _zone_key(line, page))[0]})
    filled = sum(1 for page in pages if page.lines)
    # Left and right pages often differ, so a line on somewhat less than half of many pages is a running one too.
    needed = max(2, 0.6 * filled) if filled < 8 else 0.4 * filled
    return frozenset(key for key, count in counts.items() if count >= needed)


def _join_fragments(lines: Iterable[Line]) -> list[Line]:
    """Join pieces that stand beside each other, such as an exponent and what follows it."""
    rows: list[Line] = []
    for line in lines:
        if rows:
            last = rows[-1]
            size = max(last.size, line.size, 1.0)
            gap = line.left - last.right
            if abs(line.baseline - last.baseline) < 0.45 * size and -0.5 * size < gap < 1.5 * size:
                joint = "" if gap < 0.15 * size else " "
                larger = last if last.size >= line.size else line
                rows[-1] = replace(
                    last, text=last.text + joint + line.text, right=line.right, baseline=larger.baseline, size=size
                )
                continue
        rows.append(line)
    return rows


def _heading_sizes(rows: Sequence[Sequence[Line]]) -> list[float]:
    """Type sizes of headings, largest first, at most three; empty if the document has one size only."""
    chars: Counter[float] = Counter()
    for lines in rows:
        for line in lines:
            chars[round(line.size, 1)] += len(line.text)
    if not chars:
        return []
    body = chars.most_common(1)[0][0]
    larger = [size for size, count in chars.items() if size >= 1.15 * body and count < 0.15 * chars.total()]
    return sorted(larger, reverse=True)[:3]


def _page_text(lines: Sequence[Line], heading_sizes: Sequence[float]) -> str:
    pitch = _usual_pitch(lines)
    rights: dict[int, float] = {}  # how far lines reach that begin at about the same place
    for line in lines:
        rights[_column(line)] = max(rights.get(_column(line), line.right), line.right)
    widest = max((line.right - line.left for line in lines), default=0.0)
    out: list[str] = []
    previous: Line | None = None
    for line in lines:
        level = _heading_level(line, heading_sizes)
        text = "#" * level + " " + line.text if level else line.text
        if previous is None:
            out.append(text)
        elif level or _heading_level(previous, heading_sizes):
            same = level == _heading_level(previous, heading_sizes)
            goes_on = same and _heading_goes_on(previous, line, widest)
            out.append(" " + line.text if goes_on else "\n\n" + text)
        else:
            out.append(_joint(previous, line, pitch, rights[_column(previous)]) + text)
        previous = line
    return "".join(out)


def _heading_goes_on(previous: Line, line: Line, widest: float) -> bool:
    """Is `line` the second line of one heading? Then the first is long, close, and starts or centres at one place."""
    starts = abs(previous.left - line.left) < line.size
    centres = abs(previous.left + previous.right - line.left - line.right) < 2 * line.size
    long = previous.right - previous.left > 0.5 * widest
    return long and (starts or centres) and 0 < previous.baseline - line.baseline < 1.6 * line.size


def _column(line: Line) -> int:
    return round(line.left / (4 * max(line.size, 1.0)))


def _heading_level(line: Line, sizes: Sequence[float]) -> int:
    size = round(line.size, 1)
    if size not in sizes or len(line.text) > _MAX_HEADING_CHARS or not re.search(r"[^\W\d_]", line.text):
        return 0
    return sizes.index(size) + 1


def _usual_pitch(lines: Sequence[Line]) -> float:
    pitches = [
        above.baseline - below.baseline
        for above, below in pairwise(lines)
        if 0 < above.baseline - below.baseline < 3 * max(above.size, 1)
    ]
    # The lower half: distances between paragraphs must not pass for distances between lines.
    return median(sorted(pitches)[: len(pitches) // 2 + 1]) if pitches else 0.0


def _joint(previous: Line, line: Line, pitch: float, right: float) -> str:
    """What stands between two lines: a space, a line break, or a paragraph break."""
    ended = _TERMINAL.search(previous.text) is not None
    goes_on = line.text[:1].islower() and not ended
    short = previous.right < right - 0.15 * max(right - previous.left, 1.0)
    listed = _LIST_MARKER.match(line.text) is not None
    if not goes_on and _begins_paragraph(previous, line, pitch, ended=ended):
        return "\n\n"
    if listed:
        return "\n"
    if short and ended and not _LIST_MARKER.match(previous.text):
        return "\n\n"
    if (short and not line.text[:1].islower()) or (_LABEL.match(line.text) and _LABEL.match(previous.text)):
        return "\n"
    return " "


def _begins_paragraph(previous: Line, line: Line, pitch: float, *, ended: bool) -> bool:
    size = max(previous.size, 1.0)
    drop = previous.baseline - line.baseline
    return (
        drop < -0.5 * size  # up again: a new column
        or (pitch > 0 and drop > max(1.3 * pitch, 1.1 * size))
        or abs(previous.size - line.size) > 0.15 * size
        or (ended and line.left > previous.left + size)  # indented
    )


def _mend_words(texts: Sequence[str]) -> list[str]:
    """Join words broken at line ends; keep the hyphen of a compound that the document writes with one elsewhere."""
    marked = [re.sub(r"(?<=\w)[-\u00ad\u2010] (?=[^\W\d_A-Z])", BROKEN_WORD, text) for text in texts]
    known: Counter[str] = Counter()
    for text in marked:
        known.update(re.findall(r"\w+(?:[-‐]\w+)*", text.lower()))

    def mend(match: re.Match[str]) -> str:
        left, right = match.group(1), match.group(2)
        hyphened = f"{left}-{right}"
        if not (left[-1:].islower() and right[:1].islower()):
            return hyphened
        joined = left + right
        return hyphened if known[hyphened.lower()] > known[joined.lower()] else joined

    mended = [re.sub(rf"(\w+){BROKEN_WORD}[\s]*(\w+)", mend, text) for text in marked]
    return [text.replace(BROKEN_WORD, "-") for text in mended]

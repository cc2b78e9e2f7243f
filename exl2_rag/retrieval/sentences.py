"""Where sentences begin and end. Rules only: no model, no language data beyond the lists below, exact offsets.

A sentence never spans a paragraph break (a blank line) and ends at a line break, unless the line looks wrapped in the
middle of a sentence. Written for English; text in other scripts is still cut at its own full stops.
"""

from __future__ import annotations

import re
from collections.abc import Iterator


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The full stop after these ends nothing.
_NEVER_LAST = _words("vs v cf viz eg ie approx incl resp e.g i.e a.k.a")
# Capitalised, these stand before a name.
_TITLES = _words("mr mrs ms messrs dr prof hon rev fr gen col maj capt cmdr lt sgt gov sen rep pres st mt ft ed eds")
# These stand before a number.
_NUMBERED = _words(
    "no nos fig figs eq eqs sec secs ch chap vol vols pp p art c ca nr tab ref refs jan feb mar apr jun jul aug sep "
    "sept oct nov dec"
)
# These may end a sentence; the next word decides.
_MAYBE_LAST = _words("al jr sr inc ltd co corp bros dept univ assn ave blvd rd hrs esq ph bc ad am pm est")
# Words that begin a sentence far more often than they continue a name.
_STARTERS = _words(
    "the a an this that these those it its he his she her they their we our you your i my there here in on at by for "
    "from to with as if when while where after before since although though because however but and or so then thus "
    "also both each some many most all no not one two several such other another according during under over between "
    "until upon despite what who why how which"
)

_PARAGRAPH_BREAK = re.compile(r"\n[^\S\n]*\n\s*")
_STRUCTURE_LINE = re.compile(r"[^\S\n]*(?:[-*+•‣◦·–—]\s|\(?\d{1,3}[.)]\s|\(?[A-Za-z][.)]\s|#{1,6}\s|\||>|```|~~~)")
_LINE_ENDS = frozenset(".!?…:;。！？|")
_CLOSERS = "\"'”’»)]}*_"
_STOP = re.compile(r"[.!?…]+[\"'”’»)\]}*_]*(?:\[\d{1,3}\])*(?=\s|$)|[。！？]+[”’」』）]*")
_LAST_WORD = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]+$|\d+$")
_LIST_NUMBER = re.compile(r"\W*(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5})")
_NEXT_WORD = re.compile(r"[\s\"'“‘«(\[{*_¿¡]*(\w[\w'’]*)?")

_WRAPPED_LINE_CHARS = 30  # a shorter line that lacks a full stop is taken for a heading or verse, not for wrapped text
_LONGEST_WORD_CHARS = 40  # looked at before a full stop
_BRACKET_SPAN_CHARS = 400  # a bracket still open after this many characters is taken for a slip and ignored


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Cut `text` into sentences.

    Returns:
        (start, end) pairs in order, not overlapping, without white space at either end. Together they hold every
        character of `text` that is not white space.
    """
    sentences: list[tuple[int, int]] = []
    for start, end in _lines(text):
        sentences.extend(_split_line(text, start, end))
    return sentences


def _lines(text: str) -> Iterator[tuple[int, int]]:
    """Runs of text a sentence cannot leave: paragraphs, and within them lines that are not merely wrapped."""
    start = 0
    for gap in [*_PARAGRAPH_BREAK.finditer(text), None]:
        end = gap.start() if gap else len(text)
        line_start = start
        while line_start < end:
            line_end = text.find("\n", line_start, end)
            while line_end != -1 and _goes_on_after(text, line_start, line_end, end):
                line_end = text.find("\n", line_end + 1, end)
            line_end = end if line_end == -1 else line_end
            yield line_start, line_end
            line_start = line_end + 1
        start = gap.end() if gap else len(text)


def _goes_on_after(text: str, run_start: int, newline: int, end: int) -> bool:
    """Is the line break at `newline` a wrap in the middle of a sentence?"""
    line_start = max(run_start, text.rfind("\n", run_start, newline) + 1)
    line = text[line_start:newline].strip()
    if (
        len(line) < _WRAPPED_LINE_CHARS
        or line.startswith("|")
        or line.rstrip(_CLOSERS)[-1:] in _LINE_ENDS
        or _STRUCTURE_LINE.match(text, newline + 1, end)
    ):
        return False
    following = text[newline + 1 : min(end, newline + 200)].lstrip(" \t")
    first = following[:1]
    return first.islower() or first.isdigit() or line[-1] in ",-–—(" or len(line) >= 2 * _WRAPPED_LINE_CHARS


def _split_line(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    sentence_start = _skip_space(text, start, end)
    for stop in _STOP.finditer(text, start, end):
        if stop.start() < sentence_start or not _ends_sentence(text, sentence_start, stop, end):
            continue
        yield sentence_start, stop.end()
        sentence_start = _skip_space(text, stop.end(), end)
    last = end
    while last > sentence_start and text[last - 1].isspace():
        last -= 1
    if last > sentence_start:
        yield sentence_start, last


def _ends_sentence(text: str, sentence_start: int, stop: re.Match[str], end: int) -> bool:
    if text[stop.start()] in "。！？":
        return True
    following = _NEXT_WORD.match(text, stop.end(), end)
    word = (following and following.group(1)) or ""
    if _skip_space(text, stop.end(), end) == end:
        return True
    if word[:1].islower() or _inside_bracket(text, sentence_start, stop.end(), end):
        return False
    if stop.group()[0] != "." or stop.group().startswith(".."):
        return True
    before = text[max(sentence_start, stop.start() - _LONGEST_WORD_CHARS) : stop.start()]
    if _LIST_NUMBER.fullmatch(before):
        return False
    last = _LAST_WORD.search(before)
    return last is None or len(stop.group()) > 1 or not _is_abbreviation(last.group(), word)


def _is_abbreviation(last: str, following: str) -> bool:
    """Does the full stop after the word `last`, before the word `following`, belong to an abbreviation?"""
    key = last.lower()
    if key in _NUMBERED and following[:1].isdigit():
        return True
    if key in _NEVER_LAST or (key in _TITLES and last[0].isupper()):
        return True
    is_initial = len(last) == 1 and last.isupper()
    is_acronym = "." in last  # "U.S", "p.m", "Ph.D": the last full stop is not part of the match
    return (is_initial or is_acronym or key in _MAYBE_LAST) and following.lower() not in _STARTERS


def _inside_bracket(text: str, sentence_start: int, position: int, end: int) -> bool:
    """Is a bracket opened in this sentence still open at `position`, and closed soon after?"""
    opened = text.rfind("(", max(sentence_start, position - _BRACKET_SPAN_CHARS), position)
    if opened == -1 or text.find(")", opened, position) != -1:
        return False
    return text.find(")", position, min(end, opened + _BRACKET_SPAN_CHARS)) != -1


def _skip_space(text: str, position: int, end: int) -> int:
    while position < end and text[position].isspace():
        position += 1
    return position

"""Finding a quote in its document: exact, or equal up to typography, or nearly so; otherwise not at all.

`verify_quote` never trusts what a model wrote. It returns offsets, and the text's own characters at these offsets; a
quote it cannot place is not placed. Knows texts, neither chunks nor models.

The three ways a quote can hold, tried in this order:

    exact        the document has these very characters
    normalised   it has them up to compatibility forms, ligatures, dashes, quotation marks and white space
    near         it has almost these words, with the same numbers (at least `NEAR_SCORE` of 100); shown with the
                 document's wording, and flagged
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

MatchKind = Literal["exact", "normalised", "near"]

NEAR_SCORE = 95.0
"""Least similarity, of 100, of a quote that is accepted as near."""

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\ufe58\ufe63\uff0d"
_SINGLE_QUOTES = "\u2018\u2019\u201a\u201b\u2032\u2039\u203a\u02bc\u0060\u00b4\u1ffd\uff07"
_DOUBLE_QUOTES = "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\uff02"
_INVISIBLE = "\u00ad\u200b\u200c\u200d\u2060\ufeff"
_FOLD = {
    **dict.fromkeys(map(ord, _DASHES), "-"),
    **dict.fromkeys(map(ord, _SINGLE_QUOTES), "'"),
    **dict.fromkeys(map(ord, _DOUBLE_QUOTES), '"'),
    **dict.fromkeys(map(ord, _INVISIBLE), ""),
}

# Scripts written without spaces between words, where any character may begin or end a quote. At least those in which
# the quote constraint cuts, or a quote it allows could be refused here.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\uff00-\uffef\U0001f000-\U0010ffff]"
)


@dataclass(frozen=True, slots=True)
class QuoteMatch:
    """Where a quote stands. `text[start:end]` of the searched text is `quote`, whatever the model wrote."""

    start: int
    end: int
    quote: str
    match: MatchKind
    score: float


@dataclass(frozen=True, slots=True)
class NormalisedText:
    """A text folded for comparison, with the way back.

    Attributes:
        text: the folded text; no white space at its ends, single spaces inside.
        starts, ends: for each folded character, the part of the original text it came from; of a run of white space,
            the first character.
    """

    text: str
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Offsets in the original of folded characters `start` to `end` (at least one)."""
        return self.starts[start], self.ends[end - 1]


def normalise(text: str) -> NormalisedText:
    """Fold compatibility forms, ligatures, dashes, quotation marks, invisible characters and white space.

    Uses the decomposed form (NFKD), which equates the same strings as NFKC and can be computed a character and its
    combining marks at a time, so that every folded character knows its place in `text`.
    """
    folded: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for start, end in _clusters(text):
        # Folded first: NFKD would turn a spacing acute, often used as an apostrophe, into a space and a mark.
        piece = unicodedata.normalize("NFKD", text[start:end].translate(_FOLD)).translate(_FOLD)
        for character in piece:
            space = character.isspace()
            if space and (not folded or folded[-1] == " "):
                continue
            folded.append(" " if space else character)
            starts.append(start)
            ends.append(end)
    if folded and folded[-1] == " ":
        del folded[-1], starts[-1], ends[-1]
    return NormalisedText("".join(folded), tuple(starts), tuple(ends))


def verify_quote(quote: str, text: str) -> QuoteMatch | None:
    """Find `quote` in `text`.

    Args:
        quote: what a model wrote as a quotation; white space at its ends does not count.
        text: the chunk or document it is said to come from.

    Returns:
        The place, with `text[start:end]` as `quote`; of several equally good ones the first. A place inside a word
        ("art" in "cart") is none. None when the text does not hold the quote.
    """
    quote = quote.strip()
    if not quote:
        return None
    for start in _occurrences(quote, text):
        if _at_word_edges(text, start, start + len(quote)):
            return QuoteMatch(start, start + len(quote), quote, "exact", 100.0)
    wanted, held = normalise(quote), normalise(text)
    if not wanted.text:
        return None
    for place in _occurrences(wanted.text, held.text):
        start, end = held.span(place, place + len(wanted.text))
        # The second test refuses half a ligature: its folded characters share one place in the text.
        if _at_word_edges(text, start, end) and normalise(text[start:end]).text == wanted.text:
            return QuoteMatch(start, end, text[start:end], "normalised", 100.0)
    return _near(wanted.text, text, held)


def _near(wanted: str, text: str, held: NormalisedText) -> QuoteMatch | None:
    from rapidfuzz import fuzz

    if len(wanted) > len(held.text) * 1.1:  # could not reach NEAR_SCORE, and rapidfuzz would look for text in quote
        return None
    alignment = fuzz.partial_ratio_alignment(wanted, held.text, score_cutoff=NEAR_SCORE - 10)
    if alignment is None or alignment.dest_start == alignment.dest_end:
        return None
    start, end = held.span(alignment.dest_start, alignment.dest_end)
    best: QuoteMatch | None = None
    # The aligned window has the length of the quote, so its ends may lie a little inside or outside the right words.
    for first in _word_edges_near(text, start):
        for last in _word_edges_near(text, end):
            found = text[first:last].strip()
            if first >= last or not found:
                continue
            folded = normalise(found).text
            score = fuzz.ratio(wanted, folded)
            if score >= NEAR_SCORE and _numbers(folded) == _numbers(wanted) and (best is None or score > best.score):
                begin = first + text[first:last].index(found)
                best = QuoteMatch(begin, begin + len(found), found, "near", score)
    return best


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def _word_edges_near(text: str, offset: int) -> list[int]:
    """`offset` if no word is cut there, else the edges of the cut word and of its neighbours."""
    edges = []
    for step in (-1, 1):
        place, seen = offset, 0
        while 0 <= place <= len(text) and seen < 2:
            if not _inside_word(text, place):
                edges.append(place)
                seen += 1
            place += step
    return sorted(set(edges))


def _occurrences(part: str, text: str) -> Iterator[int]:
    place = text.find(part)
    while place >= 0:
        yield place
        place = text.find(part, place + 1)


def _at_word_edges(text: str, start: int, end: int) -> bool:
    return not (_inside_word(text, start) or _inside_word(text, end))


def _inside_word(text: str, offset: int) -> bool:
    """Whether a cut at `offset` would cut a word, or part a letter from its accent."""
    if not 0 < offset < len(text):
        return False
    before, after = text[offset - 1], text[offset]
    if before.isspace() or after.isspace():
        return False
    if unicodedata.combining(after):
        return True
    if _UNSPACED.match(before) or _UNSPACED.match(after):
        return False
    return (before.isalnum() or unicodedata.combining(before) != 0) and after.isalnum()


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Each character with the combining marks that follow it."""
    start = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or not unicodedata.combining(text[end]):
            yield start, end
            start = end

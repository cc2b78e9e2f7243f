"""Answers whose quotes can only be verbatim pieces of the given passages.

    {"answerable":true,"claims":[{"source":"d1","quote":"…","text":"…"}]}      or      {"answerable":false,"claims":[]}

The JSON is compact and its keys come in this order. Which quotes are possible depends on the source named before them,
so a quote cannot be put into the mouth of another source. Knows nothing of documents: a passage is a label and a text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence

from llguidance import LLMatcher

from exl2_rag.errors import ConstraintError
from exl2_rag.llm.constraint.base import Constraint
from exl2_rag.llm.constraint.text_forms import any_of_literals

# One character of a JSON string as `json.dumps` writes it, by whether it is whitespace to `str.split`.
_BLACK = r'(?:[^\\\s]|\\["\\b]|\\u00(?:0[0-7ef]|1[0-9ab]))'
_WHITE = r"(?:\s|\\[ntrf]|\\u00(?:0b|1[c-f]))"
# One character of a claim's own text: no control character and no line break, written out or escaped.
_TEXT_CHARACTER = r'(?:[^"\\\x00-\x1f\x7f-\x9f\u2028\u2029]|\\["\\])'
_TEXT_FIRST = r'(?:[^"\\\s\x00-\x1f\x7f-\x9f]|\\["\\])'

_DECLINED = '{"answerable":false,"claims":[]}'


class AnswerWithQuotes(Constraint):
    """An answer of claims, each with a quote from a passage, or a refusal to answer.

    Args:
        passages: by label, either a text, any run of whole words of which may be quoted, or a sequence of texts, one of
            which must be quoted as it is. Empty: the only answer left is to decline.
        max_claims: claims at most; an answer has at least one.
        min_words: words (as `str.split` counts them) that a run must have at least, unless the passage is shorter.
        max_text_chars: characters of a claim's own text at most; it has at least one and is a single line.
    """

    _precompute = False  # there is a large expression per passage, and an answer meets one or two of them

    def __init__(
        self,
        passages: Mapping[str, str | Sequence[str]],
        *,
        max_claims: int = 3,
        min_words: int = 3,
        max_text_chars: int = 200,
    ) -> None:
        self.passages = {
            label: passage if isinstance(passage, str) else tuple(passage) for label, passage in passages.items()
        }
        self.max_claims = max_claims
        self.min_words = min_words
        self.max_text_chars = max_text_chars

    def _build_grammar(self) -> str:
        for name in ("max_claims", "min_words", "max_text_chars"):
            if getattr(self, name) < 1:
                raise ConstraintError(f"{name} must be at least 1, got {getattr(self, name)}")
        declined = json.dumps(_DECLINED)
        if not self.passages:
            return LLMatcher.grammar_from_lark(f"start: {declined}\n")
        opening, closing = json.dumps('{"answerable":true,"claims":['), json.dumps("]}")
        more = f"({json.dumps(',')} claim){{0,{self.max_claims - 1}}}" if self.max_claims > 1 else ""
        rules = [
            f"start: {declined} | {opening} claim {more} {closing}",
            "claim: " + " | ".join(f"claim_{n}" for n in range(len(self.passages))),
            f"TEXT: /{_TEXT_FIRST}{_TEXT_CHARACTER}{{0,{self.max_text_chars - 1}}}/",
        ]
        for n, (label, passage) in enumerate(self.passages.items()):
            head, middle = f'{{"source":"{_escaped(label, label)}","quote":"', '","text":"'
            rules.append(
                f"claim_{n}: {json.dumps(head)} QUOTE_{n} {json.dumps(middle)} TEXT {json.dumps(chr(34) + '}')}"
            )
            if isinstance(passage, str):
                rules += self._run_of_words(n, label, passage)
            else:
                rules.append(f"QUOTE_{n}: {_one_of(label, passage)}")
        return LLMatcher.grammar_from_lark("\n".join(rules) + "\n")

    def _run_of_words(self, n: int, label: str, passage: str) -> list[str]:
        n_words = min(self.min_words, len(passage.split()))
        if n_words == 0:
            raise ConstraintError(f"the passage {label!r} holds no word, so nothing can be quoted; leave it out")
        chunks = [_escaped(piece, label) for piece in split_at_word_borders(passage)]
        shape = f"{_BLACK}+(?:{_WHITE}+{_BLACK}+){{{n_words - 1}}}(?:{_WHITE}+{_BLACK}+)*"
        return [
            f"QUOTE_{n}: RUN_{n} & /{shape}/",
            f"RUN_{n}: %regex {json.dumps({'substring_chunks': chunks})}",
        ]


def split_at_word_borders(text: str) -> list[str]:
    """Cut a text where a quote may begin or end; joined, the pieces are the text.

    Between words and the whitespace and punctuation around them; inside a word ("3.14", "don't", "1914–1918") never, so
    that no number is quoted in part. Scripts without spaces may be cut between characters, but never before a mark
    that belongs to the character before it.
    """
    return [piece for run in re.findall(r"\s+|\S+", text) for piece in ([run] if run.isspace() else _pieces(run))]


_BREAKS = "—…|"  # words stand on both sides without a space
_LEADING = "\"'*_#>"  # beside Unicode's opening brackets and quotation marks
_TRAILING = "\"'*_.,;:!?…—|"


def _pieces(run: str) -> list[str]:
    """Cut a run without whitespace into opening punctuation, words and closing punctuation."""
    pieces: list[str] = []
    characters = _clusters(run)
    start, stop = 0, len(characters)
    while start < stop and _opens(characters[start]):
        start += 1
    while stop > start and _closes(characters[stop - 1]):
        stop -= 1
    pieces += characters[:start]
    word = ""
    for character in characters[start:stop]:
        if character in _BREAKS or _stands_alone(character[0]):
            pieces += [word, character] if word else [character]
            word = ""
        else:
            word += character
    if word:
        pieces.append(word)
    return pieces + characters[stop:]


def _clusters(run: str) -> list[str]:
    """The characters of a run, each with the marks, joiners and modifiers that follow it."""
    if run.isascii():
        return list(run)
    clusters: list[str] = []
    for character in run:
        joined = bool(clusters) and (clusters[-1][-1] == "\u200d" or _attaches(character))
        if joined:
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _attaches(character: str) -> bool:
    if character < "\u0300":
        return character == "\u00ad"
    return unicodedata.category(character) in {"Mn", "Mc", "Me", "Cf"} or "\U0001f3fb" <= character <= "\U0001f3ff"


def _opens(cluster: str) -> bool:
    return cluster in _LEADING or unicodedata.category(cluster[0]) in {"Ps", "Pi"}


def _closes(cluster: str) -> bool:
    return cluster in _TRAILING or unicodedata.category(cluster[0]) in {"Pe", "Pf"}


def _stands_alone(character: str) -> bool:
    """Whether the character belongs to a script that is written without spaces (or is a pictograph)."""
    if character < "\u0e00":
        return False
    return (
        "\u0e00" <= character <= "\u0eff"  # Thai, Lao
        or "\u1000" <= character <= "\u109f"  # Myanmar
        or "\u1780" <= character <= "\u17ff"  # Khmer
        or "\u2e80" <= character <= "\ua4cf"  # CJK, kana, Yi
        or "\uf900" <= character <= "\ufaff"
        or "\uff00" <= character <= "\uffef"
        or character >= "\U0001f000"  # pictographs and the CJK extensions
    )


def _one_of(label: str, quotes: Sequence[str]) -> str:
    if not quotes or not all(quotes):
        raise ConstraintError(f"the passage {label!r} lists no quote, or an empty one: {quotes!r}; leave it out")
    return any_of_literals(_escaped(quote, label) for quote in quotes)


def _escaped(text: str, label: str) -> str:
    """The inside of a JSON string, escaped no more than JSON asks for."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConstraintError(f"the passage {label!r} holds a lone surrogate, which is no character") from error
    return json.dumps(text, ensure_ascii=False)[1:-1]

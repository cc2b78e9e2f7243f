"""Calibration text as rows of token ids: what a user gives, or a mix that needs no data of others.

The built-in mix is made of what every Python installation carries: its manual, its source code and the docstrings in
it; a paragraph in many languages; rows of pieces in random order; and random tokens, so that no part of the vocabulary
is left out. What is calibrated with matters little as long as it is varied; text like that the model will read is
better.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from exl2_rag.errors import CalibrationError
from exl2_rag.llm.tokenizer import Tokenizer

BUILT_IN: Final = "built-in"
_PIECE_TOKENS = 64  # of rows whose pieces are in random order
_SHARES: Final[dict[str, float]] = {"manual": 0.3, "docstrings": 0.25, "code": 0.2, "languages": 0.05, "pieces": 0.1}
_TEXT_CHARS = 1 << 19  # of the standard library's source code, which docstrings are taken from too
_TOKENIZED_CHARS = 1 << 16  # text handed to the tokenizer at a time

# Article 1 of the Universal Declaration of Human Rights, which is in the public domain.
_LANGUAGES: Final = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience and should act towards one another in a spirit of brotherhood.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen "
    "begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di "
    "coscienza e devono agire gli uni verso gli altri in spirito di fratellanza.",
    "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de "
    "consciência, devem agir uns para com os outros em espírito de fraternidade.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и "
    "должны поступать в отношении друг друга в духе братства.",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心と"
    "を授けられており、互いに同胞の精神をもって行動しなければならない。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 "
    "부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا بروح الإخاء.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
)


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Rows of token ids.

    Attributes:
        ids: [R, T] int64.
        source: where they are from, for the record.
    """

    ids: Tensor
    source: str


def rows_from_texts(
    tokenizer: Tokenizer, texts: Iterable[str], *, rows: int, length: int, source: str
) -> CalibrationText:
    """The first `rows` rows of `length` tokens of texts, laid end to end; only as much is read as is needed.

    Raises:
        CalibrationError: there is too little text.
    """
    ids: list[int] = []
    for text in texts:
        if text.strip():
            ids += _encode(tokenizer, text, rows * length - len(ids))
        if len(ids) >= rows * length:
            break
    if len(ids) < rows * length:
        raise CalibrationError(
            f"calibration with {rows} rows of {length} tokens needs {rows * length} tokens, {source} has {len(ids)}; "
            "give more text, or ask for fewer or shorter rows"
        )
    return CalibrationText(torch.tensor(ids[: rows * length]).view(rows, length), source)


def built_in_rows(tokenizer: Tokenizer, *, rows: int, length: int, seed: int) -> CalibrationText:
    """The built-in mix, its kinds in turn, so that the first rows are as mixed as all of them.

    Raises:
        CalibrationError: this Python installation carries too little text.
    """
    chance = random.Random(seed)
    docstrings = _docstrings()
    streams = {
        "manual": _Stream(tokenizer, _manual() or docstrings),
        "docstrings": _Stream(tokenizer, docstrings),
        "code": _Stream(tokenizer, _code()),
        "languages": _Stream(tokenizer, _languages(chance)),
    }
    pieces = _Stream(tokenizer, docstrings[::-1])
    chosen: list[list[int]] = []
    for kind in _in_turn(rows):
        if kind == "random":
            chosen.append([chance.randrange(tokenizer.vocab_size) for _ in range(length)])
        elif kind == "pieces":
            row = pieces.take(length)
            parts = [row[start : start + _PIECE_TOKENS] for start in range(0, length, _PIECE_TOKENS)]
            chance.shuffle(parts)
            chosen.append([token for part in parts for token in part])
        else:
            chosen.append(streams[kind].take(length))
    return CalibrationText(torch.tensor(chosen), BUILT_IN)


class _Stream:
    """Tokens of a kind of text, from the beginning again when it ends."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._next = 0
        self._ids: list[int] = []

    def take(self, count: int) -> list[int]:
        while len(self._ids) < count:
            if not any(self._texts):
                raise CalibrationError(
                    "this Python installation carries no text of its own to calibrate with; give some of your own"
                )
            self._ids += _encode(self._tokenizer, self._texts[self._next % len(self._texts)], count)
            self._next += 1
        taken, self._ids = self._ids[:count], self._ids[count:]
        return taken


def _in_turn(rows: int) -> Iterator[str]:
    """A kind for each row: whichever is furthest behind its share."""
    counts = dict.fromkeys((*_SHARES, "random"), 0)
    shares = _SHARES | {"random": 1 - sum(_SHARES.values())}
    for row in range(1, rows + 1):
        kind = max(counts, key=lambda one: shares[one] * row - counts[one])
        counts[kind] += 1
        yield kind


def _encode(tokenizer: Tokenizer, text: str, at_most: int) -> list[int]:
    ids: list[int] = []
    for start in range(0, len(text), _TOKENIZED_CHARS):
        if len(ids) >= at_most:
            break
        ids += tokenizer.encode(text[start : start + _TOKENIZED_CHARS])
    return ids


def _manual() -> list[str]:
    """Python's reference manual as `help()` shows it; nothing where an installation lacks that."""
    if importlib.util.find_spec("pydoc_data") is None:
        return []
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _library_files() -> Iterator[str]:
    """The text of the standard library's modules."""
    total = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        total += len(text)
        yield text
        if total > _TEXT_CHARS:
            return


def _code() -> list[str]:
    return list(_library_files())


def _docstrings() -> list[str]:
    found: list[str] = []
    for text in _library_files():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) > 80:
                    found.append(docstring + "\n\n")
    return found


def _languages(chance: random.Random) -> list[str]:
    texts = list(_LANGUAGES)
    chance.shuffle(texts)
    return [text + "\n" for text in texts]

"""Texts to evaluate on: plain files, JSON lines, and folders of either."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from exl2_rag.errors import SettingsError

TEXT_SUFFIXES = (".txt", ".md", ".raw", ".jsonl")
"""What is read of a folder. A file that is named itself may have any suffix; `.jsonl` is JSON lines."""

RECORD_SEPARATOR = "\n\n"
"""Between the texts of a JSON lines file, as the field joins the rows of WikiText-2."""


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """One text and where it comes from; windows never reach from one text into another."""

    name: str
    text: str


def read_texts(paths: Iterable[Path]) -> list[EvaluationText]:
    """The texts of files and of all text files below folders, in the order given, those of a folder sorted.

    A line of a `.jsonl` file is an object with a "text", or a string.

    Raises:
        SettingsError: there is no such file, nothing to read in it, or something that is no text.
    """
    texts = [_read(file) for path in paths for file in _files(path)]
    if not texts:
        raise SettingsError("expected at least one file or folder of text, got none")
    return texts


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SettingsError(f"there is no file or folder at {path}; give a text to evaluate on")
    found = sorted(one for one in path.rglob("*") if one.suffix in TEXT_SUFFIXES and one.is_file())
    if not found:
        raise SettingsError(f"the folder {path} holds no {', '.join(TEXT_SUFFIXES)} file")
    return found


def _read(path: Path) -> EvaluationText:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        text = RECORD_SEPARATOR.join(_record(path, number, line) for number, line in lines)
    if not text.strip():
        raise SettingsError(f"{path} holds no text")
    return EvaluationText(str(path), text)


def _record(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise SettingsError(f"{path}, line {number}: no valid JSON ({error})") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise SettingsError(f'{path}, line {number}: expected an object with a "text", or a string; got {line[:60]!r}')
    return text

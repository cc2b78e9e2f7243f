"""Answer settings are checked at once, and a model's card is obeyed or refused, never half read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exl2_rag.errors import ModelNotFoundError, SettingsError, UnsupportedModelError
from exl2_rag.qa.settings import CARD_NAME, QASettings


def write_card(directory: Path, card: Any) -> Path:
    (directory / CARD_NAME).write_text(card if isinstance(card, str) else json.dumps(card), encoding="utf-8")
    return directory


def test_a_model_without_a_card_gets_the_defaults(tmp_path: Path) -> None:
    assert QASettings.for_model(tmp_path) == QASettings()


def test_the_card_decides_what_nobody_set(tmp_path: Path) -> None:
    write_card(tmp_path, {"prompt_form": "1", "quote_unit": "sentence", "k": 2, "max_claims": 1, "_about": "SQuAD"})
    assert QASettings.for_model(tmp_path) == QASettings(quote_unit="sentence", k=2, max_claims=1)
    assert QASettings.for_model(tmp_path, k=5, quote_unit=None) == QASettings(quote_unit="sentence", k=5, max_claims=1)


def test_a_missing_model_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        QASettings.for_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("card", "complaint"),
    [
        ("{", "cannot be read"),
        ("\udcff", "cannot be read"),
        ("[]", "JSON object"),
        ({"k": 2}, "prompt form None"),
        ({"prompt_form": "2"}, "prompt form '2'"),
        ({"prompt_form": 1}, "prompt form 1;"),
        ({"prompt_form": "1", "beams": 4}, "beams"),
        ({"prompt_form": "1", "k": 0}, "k must be"),
        ({"prompt_form": "1", "quote_unit": "line"}, "quote_unit"),
    ],
)
def test_a_card_that_cannot_be_obeyed_is_refused(tmp_path: Path, card: Any, complaint: str) -> None:
    if card == "\udcff":
        (tmp_path / CARD_NAME).write_bytes(b"\xff\xfe{")
    else:
        write_card(tmp_path, card)
    with pytest.raises(UnsupportedModelError, match=complaint):
        QASettings.for_model(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"k": 0},
        {"k": True},
        {"k": "3"},
        {"max_claims": 0},
        {"min_words": 0},
        {"max_text_chars": 0},
        {"max_tokens": 15},
        {"quote_unit": "word"},
        {"claim_text": "both"},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "warm"},
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(values))):
        QASettings(**values)


def test_an_unknown_override_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="beams"):
        QASettings.for_model(tmp_path, beams=4)

"""How questions are answered, and what a model's card says about it.

A model trained for this project carries `exl2_rag.json` beside its weights:

    {"prompt_form": "1", "quote_unit": "sentence", "k": 2, "max_claims": 1}

`prompt_form` is required, any field of `QASettings` may follow, and a key beginning with "_" is a remark. Knows no
engine and no index.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from exl2_rag.errors import ModelNotFoundError, SettingsError, UnsupportedModelError
from exl2_rag.qa.prompt import PROMPT_FORM_VERSION

CARD_NAME = "exl2_rag.json"
QuoteUnit = Literal["sentence", "span"]
ClaimText = Literal["model", "quote"]
ChunkOrder = Literal["canonical", "label", "relevance"]


@dataclass(frozen=True, slots=True)
class QASettings:
    """How questions are answered.

    Attributes:
        k: retrieved chunks put into the prompt.
        quote_unit: what a quote may be: "sentence" (one whole sentence of a chunk) or "span" (any run of its words).
        max_claims: claims in an answer at most.
        min_words: words of a quote at least; only for "span".
        claim_text: what a claim says: "model" (the model's own words) or "quote" (the quote itself, for a model too
            small to put an answer into words).
        max_text_chars: characters of a claim's own text at most.
        max_tokens: tokens of a reply at most. A reply cut off here is marked, see `Answer.truncated`.
        temperature: 0 is greedy.
        order: of the chunks in the prompt. "canonical": those first that the engine's cache can go on with, then those
            shown most often, then by label; the cheapest, but it depends on what was asked before, and as the order is
            part of the prompt, a repeated question may be answered from another prompt. "label": by label, the same for
            the same chunks always. "relevance": the best match first, which reuses least.

    Raises:
        SettingsError: a value is of the wrong type or out of range.
    """

    k: int = 3
    quote_unit: QuoteUnit = "span"
    max_claims: int = 3
    min_words: int = 3
    claim_text: ClaimText = "model"
    max_text_chars: int = 200
    max_tokens: int = 512
    temperature: float = 0.0
    order: ChunkOrder = "canonical"

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("max_claims", 1), ("min_words", 1), ("max_text_chars", 1), ("max_tokens", 16)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingsError(f"{name} must be a whole number, {least} or more, got {value!r}")
        if self.quote_unit not in ("sentence", "span"):
            raise SettingsError(f'quote_unit must be "sentence" or "span", got {self.quote_unit!r}')
        if self.claim_text not in ("model", "quote"):
            raise SettingsError(f'claim_text must be "model" or "quote", got {self.claim_text!r}')
        if self.order not in ("canonical", "label", "relevance"):
            raise SettingsError(f'order must be "canonical", "label" or "relevance", got {self.order!r}')
        temperature = self.temperature
        is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if not is_number or not math.isfinite(temperature) or temperature < 0:
            raise SettingsError(f"temperature must be 0 (greedy) or more, got {temperature!r}")

    @classmethod
    def for_model(cls, model_dir: str | Path, **overrides: Any) -> QASettings:
        """What the model's card says, else the defaults; an override that is not None wins over both.

        Raises:
            ModelNotFoundError: there is no such directory.
            UnsupportedModelError: the card is broken, names a key this version does not know, or a prompt form this
                version does not have.
            SettingsError: an override is unknown or out of range.
        """
        directory = Path(model_dir)
        if not directory.is_dir():
            raise ModelNotFoundError(f"expected a model directory at {directory}, found none; check the path")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(overrides.keys() - known):
            raise SettingsError(f"unknown answer settings: {', '.join(unknown)}; the known ones: {_listed(known)}")
        path = directory / CARD_NAME
        card = _read_card(path, known) if path.exists() else {}
        try:
            from_card = cls(**card)
        except SettingsError as error:
            raise UnsupportedModelError(f"{path}: {error}") from error
        given = {name: value for name, value in overrides.items() if value is not None}
        return cls(**{**{name: getattr(from_card, name) for name in known}, **given})


def _read_card(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} cannot be read as JSON: {error}; fetch the model again") from error
    if not isinstance(card, dict):
        raise UnsupportedModelError(f"{path}: expected a JSON object, got {type(card).__name__}; fetch the model again")
    card = {name: value for name, value in card.items() if not name.startswith("_")}
    form = card.pop("prompt_form", None)
    if form != PROMPT_FORM_VERSION:
        raise UnsupportedModelError(
            f'{path}: the model was made for prompt form {form!r}; this version has "{PROMPT_FORM_VERSION}". '
            "Use a version of exl2-rag that has it, or another model"
        )
    if unknown := sorted(card.keys() - known):
        raise UnsupportedModelError(
            f"{path} asks for what this version does not know: {', '.join(unknown)}; it knows prompt_form, "
            f'{_listed(known)}, and remarks that begin with "_"'
        )
    return card


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))

"""Settings files: `configs/*.toml` turned into typed, frozen values. Knows names, units and ranges; builds nothing.

A settings file holds any of the sections `[engine]`, `[sampling]`, `[retrieval]` and `[answers]`. A section or key left
out has the default shown in `configs/default.toml`; an unknown one is an error.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exl2_rag.errors import SettingsError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EngineSettings(_Section):
    """`[engine]`: how a model is run. Names and meanings are those of `ExL2LLM`."""

    device: str = "auto"
    max_seq_len: int | None = Field(default=None, ge=16)
    cache_tokens: int | None = Field(default=None, ge=16)
    cache_dtype: Literal["auto", "fp16", "bf16", "fp32", "q8", "q6", "q4"] = "auto"
    precision: Literal["auto", "exact", "fast"] = "auto"
    max_batch_size: int | None = Field(default=None, ge=1)
    num_threads: int | None = Field(default=None, ge=1)
    kv_store: str | None = None
    kv_store_bytes: int | None = Field(default=None, ge=1)
    kv_ram_bytes: int | None = Field(default=None, ge=0)


class SamplingSettings(_Section):
    """`[sampling]`: how free text is drawn. Names and meanings are those of `SamplingParams`."""

    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.7, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0)


class RetrievalSettings(_Section):
    """`[retrieval]`: how documents are indexed and found.

    Attributes:
        store: "chroma" or "exact".
        chunk_tokens: tokens of a chunk at most, counted by the embedder; cut to what the embedder takes.
        fusion: "score" (min-max normalised scores) or "rank" (reciprocal rank fusion).
        dense_weight: share of the embedding score in score fusion, 0 to 1.
        candidates: chunks taken from each of the two searches before fusion.
    """

    store: Literal["chroma", "exact"] = "chroma"
    chunk_tokens: int = Field(default=512, ge=32)
    fusion: Literal["score", "rank"] = "score"
    dense_weight: float = Field(default=0.5, ge=0, le=1)
    candidates: int = Field(default=50, ge=1)


class AnswerSettings(_Section):
    """`[answers]`: how questions are answered. Left out, the model's card decides, then the default of `QASettings`.

    Attributes:
        chunks: retrieved chunks put into the prompt.
        quote_unit: "sentence" (whole sentences) or "span" (any run of words).
        max_claims: claims in an answer at most.
        claim_text: "model" (its own words, which are not verified) or "quote" (the quote again).
        max_tokens: tokens of an answer at most.
        order: of the chunks in the prompt, "canonical", "label" or "relevance"; see `QASettings`.
    """

    chunks: int | None = Field(default=None, ge=1)
    quote_unit: Literal["sentence", "span"] | None = None
    max_claims: int | None = Field(default=None, ge=1)
    claim_text: Literal["model", "quote"] | None = None
    max_tokens: int | None = Field(default=None, ge=16)
    order: Literal["canonical", "label", "relevance"] | None = None


class Settings(_Section):
    """All sections of one settings file."""

    engine: EngineSettings = EngineSettings()
    sampling: SamplingSettings = SamplingSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    answers: AnswerSettings = AnswerSettings()


def load_settings(name_or_path: str | Path) -> Settings:
    """Read a settings file.

    Args:
        name_or_path: a path to a TOML file, or the name of one that comes with the package ("default", "cpu-small",
            "gpu-24gb", "rag-default").

    Raises:
        SettingsError: no such file, not TOML, an unknown key, or a value out of range; the message names the key.
    """
    path = _find(name_or_path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not a TOML file: {error}. Compare it with configs/default.toml") from error
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"{path}: {_explain(error)}") from error


def builtin_names() -> list[str]:
    """Names of the settings files that come with the package."""
    return sorted(path.stem for path in _builtin_dir().glob("*.toml"))


def _builtin_dir() -> Path:
    package = Path(__file__).parent
    installed = package / "configs"  # in a wheel
    return installed if installed.is_dir() else package.parent / "configs"


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    builtin = _builtin_dir() / f"{name_or_path}.toml"
    if path.suffix == "" and builtin.is_file():
        return builtin
    raise SettingsError(
        f"there is no settings file at {path}; give a path to a TOML file or one of: {', '.join(builtin_names())}"
    )


def _explain(error: ValidationError) -> str:
    problems = []
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}; the known ones stand in configs/default.toml")
        else:
            problems.append(f"{key}: {detail['msg']}, got {detail['input']!r}")
    return "; ".join(problems)

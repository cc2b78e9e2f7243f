"""One tokenizer of every family that the engine meets, loaded once in a test run."""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from exl2_rag.llm.tokenizer import Tokenizer
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.shared_data import shared_path

SHARED_FAMILIES = ("mistral-v1", "mistral-v3", "mistral-tekken", "qwen2")
METASPACE_FAMILIES = ("metaspace-first", "metaspace-always")
FAMILIES = ("byte", *METASPACE_FAMILIES, *SHARED_FAMILIES)


def family(name: str) -> Tokenizer:
    """The tokenizer of a family; skips the calling test where its files are absent."""
    if name in SHARED_FAMILIES:
        shared_path(f"data/tokenizers/{name}")
    elif name in METASPACE_FAMILIES:
        shared_path("data/tokenizers/mistral-v1")
    return _load(name)


def shared_definition(name: str) -> dict[str, Any]:
    """The parsed `tokenizer.json` of a family that stands in the shared data."""
    folder = shared_path(f"data/tokenizers/{name}")
    plain = folder / "tokenizer.json"
    text = plain.read_text("utf-8") if plain.exists() else lzma.decompress((folder / "tokenizer.json.xz").read_bytes())
    definition = json.loads(text)
    assert isinstance(definition, dict)
    return definition


@cache
def _load(name: str) -> Tokenizer:
    if name in SHARED_FAMILIES:
        folder = shared_path(f"data/tokenizers/{name}")
        return Tokenizer.from_file(next(folder.glob("tokenizer.json*")))
    with TemporaryDirectory() as folder_name:
        if name == "byte":
            write_byte_tokenizer(Path(folder_name))
            return Tokenizer.from_dir(folder_name)
        definition = shared_definition("mistral-v1")
        definition["normalizer"] = None
        scheme = name.removeprefix("metaspace-")
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        definition["pre_tokenizer"] = metaspace
        path = Path(folder_name) / "tokenizer.json"
        path.write_text(json.dumps(definition), encoding="utf-8")
        return Tokenizer.from_file(path)

"""The files of a model directory that say how text becomes tokens: read, merged and checked.

Published models spread this over `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`,
`generation_config.json` and `config.json`; the rules for which file wins stand here and nowhere else. This module knows
nothing of encoding.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2_rag.errors import TokenizerError

# A tokenizer without any declared end takes those of these that are among its special tokens.
USUAL_END_TOKENS = (
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files of one tokenizer say.

    Attributes:
        path: the `tokenizer.json` it came from, for messages.
        definition: its content, with the added tokens of `tokenizer_config.json` merged in and without padding or
            truncation.
        special_texts: "bos_token", "eos_token", ... as declared; only those that are.
        bos_token_id: declared begin-of-sequence id, or None.
        eos_token_ids: every declared end-of-sequence id, most specific file first.
        add_bos_token: what `tokenizer_config.json` says about BOS before text; None: nothing.
    """

    path: Path
    definition: dict[str, Any]
    special_texts: Mapping[str, str]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos_token: bool | None


def read_model_dir(model_dir: Path) -> TokenizerFiles:
    """Read the tokenizer of a model directory.

    Raises:
        TokenizerError: `tokenizer.json` is missing, a file is broken, or the files contradict each other.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        hint = "the directory does not exist"
        if (model_dir / "tokenizer.model").is_file():
            hint = "there is a tokenizer.model; convert it with transformers (AutoTokenizer(...).save_pretrained)"
        elif model_dir.is_dir():
            hint = "copy it from the original model's directory"
        raise TokenizerError(f"expected a tokenizer at {path}, found none; {hint}")
    definition = _read_definition(path)
    tokenizer_config = read_json(model_dir / "tokenizer_config.json")
    _merge_added_tokens(definition, tokenizer_config, model_dir)
    texts = read_special_texts(model_dir)
    _mark_special(definition, [texts[role] for role in ("bos_token", "eos_token") if role in texts])
    ids = token_ids_by_text(definition)
    generation, config = read_json(model_dir / "generation_config.json"), read_json(model_dir / "config.json")
    nested = config.get("text_config")
    declared = [generation, config, nested if isinstance(nested, dict) else {}]

    eos = [n for source in declared for n in _id_list(source, "eos_token_id", model_dir)]
    eos += _ids_of_text(texts.get("eos_token"), ids, path)
    bos = _ids_of_text(texts.get("bos_token"), ids, path)
    bos += [n for source in declared for n in _id_list(source, "bos_token_id", model_dir)]
    add_bos = tokenizer_config.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise TokenizerError(f"{model_dir / 'tokenizer_config.json'}: add_bos_token must be a bool, got {add_bos!r}")
    return TokenizerFiles(
        path=path,
        definition=definition,
        special_texts=texts,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(eos)) or usual_end_ids(definition),
        add_bos_token=add_bos,
    )


def read_tokenizer_file(path: Path) -> TokenizerFiles:
    """Read a `tokenizer.json` (or `.json.xz`) alone; the end ids are those of its special tokens named like an end."""
    if not path.is_file():
        raise TokenizerError(f"expected a tokenizer at {path}, found no file there")
    definition = _read_definition(path)
    return TokenizerFiles(path, definition, {}, None, usual_end_ids(definition), None)


def read_special_texts(model_dir: Path) -> dict[str, str]:
    """The declared special tokens by role ("bos_token" and so on); `tokenizer_config.json` wins."""
    texts: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_json(model_dir / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                texts[key] = content
            elif key.endswith("_token") and content is None:
                texts.pop(key, None)
    return texts


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        TokenizerError: the file is there but does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        text = lzma.decompress(path.read_bytes()).decode() if path.suffix == ".xz" else path.read_text("utf-8")
        content = json.loads(text)
    except (ValueError, OSError, lzma.LZMAError) as error:
        raise TokenizerError(f"{path} is not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object, got a {type(content).__name__}; download it again")
    return content


def token_ids_by_text(definition: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the added tokens (special ones and others) by their text."""
    return {token["content"]: token["id"] for token in definition["added_tokens"]}


def usual_end_ids(definition: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of the special tokens whose text is a usual end mark."""
    special = {token["content"]: token["id"] for token in definition["added_tokens"] if token.get("special")}
    return tuple(special[text] for text in USUAL_END_TOKENS if text in special)


def _read_definition(path: Path) -> dict[str, Any]:
    definition = read_json(path)
    if not isinstance(definition.get("model"), dict):
        raise TokenizerError(f'{path} has no "model": it is not a tokenizer.json; copy the original model\'s')
    added = definition.get("added_tokens") or []
    well_formed = isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
        for token in added
    )
    if not well_formed:
        raise TokenizerError(f"{path}: every entry of added_tokens needs an id and a content; download it again")
    # Padding and truncation are a training pipeline's leftovers; a prompt is never padded or cut silently.
    return {**definition, "added_tokens": added, "padding": None, "truncation": None}


def _merge_added_tokens(definition: dict[str, Any], tokenizer_config: Mapping[str, Any], model_dir: Path) -> None:
    """Add to `definition` the tokens that only `tokenizer_config.json` lists (fine-tunes often add theirs there)."""
    listed = tokenizer_config.get("added_tokens_decoder") or {}
    known = {token["id"]: token for token in definition["added_tokens"]}
    for key, entry in listed.items():
        where = f"{model_dir / 'tokenizer_config.json'}: added_tokens_decoder[{key!r}]"
        if not str(key).isdigit() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise TokenizerError(f"{where} must map an id to an object with a content, got {entry!r}")
        token = known.get(int(key))
        if token is None:
            flags = {flag: bool(entry.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip", "special")}
            normalized = bool(entry.get("normalized", not flags["special"]))
            known[int(key)] = {"id": int(key), "content": entry["content"], "normalized": normalized, **flags}
        elif token["content"] != entry["content"]:
            raise TokenizerError(
                f"{where} is {entry['content']!r}, but tokenizer.json calls token {key} {token['content']!r}; "
                "the files are of different models"
            )
        elif entry.get("special") and not token.get("special"):
            known[int(key)] = {**token, "special": True}
    definition["added_tokens"] = [known[n] for n in sorted(known)]


def _mark_special(definition: dict[str, Any], texts: list[str]) -> None:
    """Make special tokens of those of `texts` that the vocabulary holds as ordinary ones (older files do)."""
    vocab = definition["model"].get("vocab")
    if not isinstance(vocab, dict):
        return
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    known = token_ids_by_text(definition)
    added = [
        {"id": vocab[text], "content": text, "special": True, **flags}
        for text in dict.fromkeys(texts)
        if text not in known and text in vocab
    ]
    definition["added_tokens"] = sorted([*definition["added_tokens"], *added], key=lambda token: token["id"])


def _id_list(source: Mapping[str, Any], key: str, model_dir: Path) -> list[int]:
    value = source.get(key)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in ids):
        raise TokenizerError(f"{model_dir}: {key} must be a token id or a list of them, got {value!r}")
    return ids


def _ids_of_text(text: str | None, ids: Mapping[str, int], path: Path) -> list[int]:
    if text is None:
        return []
    if text not in ids:
        raise TokenizerError(
            f"{path.parent} declares the special token {text!r}, but {path.name} has no such token; "
            "the files are of different models"
        )
    return [ids[text]]

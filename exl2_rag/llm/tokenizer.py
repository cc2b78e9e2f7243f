"""Text to token ids and back.

Encoding is done by the `tokenizers` library on the model's own `tokenizer.json`; what stands here is what an engine
needs beside it: text that cannot smuggle in special tokens, prompts made of blocks that are encoded by themselves, and
decoding token by token that only ever yields whole characters. This module knows nothing of messages or templates.

SentencePiece vocabularies put a space before a text ("▁Hello"). That space is no part of the text: here it is added at
the head of a prompt only, never at a later block, and decoding takes it off again at the head only. The head is the
first position, or the one after a BOS token at the first position.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from exl2_rag.errors import RequestError, TokenizerError
from exl2_rag.llm.token_bytes import TokenBytes
from exl2_rag.llm.tokenizer_files import TokenizerFiles, read_model_dir, read_tokenizer_file, token_ids_by_text

if TYPE_CHECKING:
    import tokenizers

_MARKUP = re.compile(r"\s*(<[^<>]*\S[^<>]*>|\[[^\[\]]*\S[^\[\]]*\])\s*")  # <think>, <|fim_prefix|>, [TOOL_CALLS]


@dataclass(frozen=True, slots=True)
class TextBlock:
    """A piece of a prompt that is encoded by itself.

    `trusted` text may hold special tokens; in any other, what looks like one is ordinary text.
    """

    text: str
    trusted: bool


class Tokenizer:
    """A model's tokenizer. Safe to use from many threads.

    Attributes:
        path: the `tokenizer.json` behind it.
        vocab_size: highest token id + 1; a model's logits may be wider (padding).
        bos_token_id: begin of sequence, or None.
        eos_token_ids: every id that ends a sequence.
        adds_bos: whether plain text gets a BOS in front.
        special_token_texts: the texts that would be read as special tokens in trusted text.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.path = files.path
        added = files.definition["added_tokens"]
        self._special_ids = frozenset(token["id"] for token in added if token.get("special"))
        control = {token["id"]: token["content"] for token in added if token.get("special") or _is_markup(token)}
        self._control_texts = control
        self.special_token_texts = tuple(control.values())
        self._control_pattern = _any_of(self.special_token_texts)
        self._backend = _build_backend(files.definition, self.path)
        self._check_ids(files)
        self._prepends = _prepends_space(files.definition)
        self._token_bytes = TokenBytes(files.definition, self._backend.id_to_token, self.path)
        self._variants: dict[tuple[bool, bool], tokenizers.Tokenizer] = {(True, False): self._backend}
        self._has_prefix_space = self._prepends or _adds_prefix_space(files.definition)
        self._variants_lock = threading.Lock()

        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        processor_bos = self._post_processor_bos()
        self.bos_token_id = files.bos_token_id if files.bos_token_id is not None else processor_bos
        self.eos_token_ids = files.eos_token_ids
        self.adds_bos = processor_bos is not None if files.add_bos_token is None else files.add_bos_token
        for n in (*self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])):
            if n >= self.vocab_size:
                raise TokenizerError(
                    f"{self.path.parent} names token id {n} as begin or end of sequence, but {self.path.name} ends at "
                    f"{self.vocab_size - 1}; the files are of different models"
                )

    @classmethod
    def from_dir(cls, model_dir: Path | str) -> Tokenizer:
        """The tokenizer of a model directory.

        Raises:
            TokenizerError: `tokenizer.json` is missing or broken, or the files contradict each other.
        """
        return cls(read_model_dir(Path(model_dir)))

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """The tokenizer of one `tokenizer.json` (or `tokenizer.json.xz`), without the files around it."""
        return cls(read_tokenizer_file(Path(path)))

    def encode(self, text: str, *, special_tokens: bool = False, add_bos: bool = False) -> list[int]:
        """Token ids of `text`, as the model's own tokenizer gives them.

        Args:
            text: what to encode.
            special_tokens: read special tokens out of the text. Otherwise what looks like one is ordinary text.
            add_bos: put the BOS token in front, unless the ids begin with it already.

        Raises:
            RequestError: `add_bos`, but the tokenizer has no BOS token.
        """
        ids = self._encode(text, trusted=special_tokens, continuation=False)
        if not add_bos:
            return ids
        if self.bos_token_id is None:
            raise RequestError(
                f"add_bos was asked for, but the tokenizer at {self.path} has no BOS token; leave it out"
            )
        return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def encode_blocks(self, blocks: Iterable[TextBlock]) -> list[int]:
        """Token ids of each block by itself, one after the other; decoding them gives the joined text.

        The ids of a block do not depend on its neighbours, so a prompt that shares leading blocks with another shares
        their ids.
        """
        ids: list[int] = []
        for block in blocks:
            text = block.text
            if block.trusted and not ids and self._bos_text and text.startswith(self._bos_text):
                ids.append(self._bos_id)
                text = text[len(self._bos_text) :]
            if not text:
                continue
            if self._prepends and self._is_head(ids) and not (block.trusted and self._begins_special(text)):
                text = " " + text
            ids += self._encode(text, trusted=block.trusted, continuation=True)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of ordinary text that goes on from other text: no special tokens, no space put before it."""
        return self._encode(text, trusted=False, continuation=True)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, after: Sequence[int] = ()) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: ids beyond `vocab_size` (padding of the model's head) have no text.
            skip_special: leave special tokens out.
            after: the ids before these, if any; see `incremental`.
        """
        decoder = self.incremental(skip_special=skip_special, after=after)
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def incremental(self, *, skip_special: bool = True, after: Sequence[int] = ()) -> IncrementalDecoder:
        """A decoder that takes ids one at a time.

        A SentencePiece space at the head is dropped if the ids stand at the start, or right after a special token such
        as the end of a chat turn; give the ids before them as `after` to keep it elsewhere.
        """
        at_head = not after or after[-1] in self._special_ids
        return IncrementalDecoder(self, skip_special=skip_special, at_head=at_head)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; a token may hold a part of a character. Empty beyond the vocabulary."""
        return self._token_bytes[token_id]

    def vocabulary(self) -> dict[str, int]:
        """Every token, added ones too, and its id. Two tokenizers that differ here give texts other ids."""
        return self._backend.get_vocab(with_added_tokens=True)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a special one, which has no text of its own."""
        return token_id in self._special_ids

    @property
    def _bos_id(self) -> int:
        assert self.bos_token_id is not None
        return self.bos_token_id

    @property
    def _bos_text(self) -> str | None:
        return None if self.bos_token_id is None else self._control_texts.get(self.bos_token_id)

    def _is_head(self, ids: Sequence[int]) -> bool:
        return not ids or (len(ids) == 1 and ids[0] == self.bos_token_id)

    def _begins_special(self, text: str) -> bool:
        return self._control_pattern is not None and self._control_pattern.match(text) is not None

    def _encode(self, text: str, *, trusted: bool, continuation: bool) -> list[int]:
        if trusted:
            return self._variant(trusted=True, continuation=continuation).encode(text, add_special_tokens=False).ids
        if self._control_pattern is None or self._control_pattern.search(text) is None:
            # Nothing in it looks special: the shared backend gives the same ids, and the other is rarely ever built.
            ids = self._variant(trusted=True, continuation=continuation).encode(text, add_special_tokens=False).ids
            if self._control_texts.keys().isdisjoint(ids):
                return ids
        ids = self._variant(trusted=False, continuation=continuation).encode(text, add_special_tokens=False).ids
        if self._control_texts.keys().isdisjoint(ids):
            return ids
        # The vocabulary's own merges lead to a special token: spell that one out.
        return [
            n
            for token_id in ids
            for n in (self._spell_out(token_id) if token_id in self._control_texts else [token_id])
        ]

    def _spell_out(self, token_id: int) -> list[int]:
        backend = self._variant(trusted=False, continuation=True)
        text = self._control_texts[token_id]
        ids = [n for character in text for n in backend.encode(character, add_special_tokens=False).ids]
        if not self._control_texts.keys().isdisjoint(ids):
            raise TokenizerError(f"{self.path} cannot write {text!r} as ordinary text; remove it from the input")
        return ids

    def _variant(self, *, trusted: bool, continuation: bool) -> tokenizers.Tokenizer:
        """The backend that reads special tokens (`trusted`) or not, with or without a space put before the text."""
        continuation = continuation and self._has_prefix_space
        with self._variants_lock:
            found = self._variants.get((trusted, continuation))
            if found is not None:
                return found
            definition = json.loads(self._backend.to_str())
            if continuation:
                definition = _without_prefix_space(definition)
            if not trusted:
                for token in definition["added_tokens"]:
                    token["special"] = token["id"] in self._control_texts
            variant = _build_backend(definition, self.path)
            variant.encode_special_tokens = not trusted
            self._variants[trusted, continuation] = variant
            return variant

    def _check_ids(self, files: TokenizerFiles) -> None:
        for text, token_id in token_ids_by_text(files.definition).items():
            found = self._backend.token_to_id(text)
            if found != token_id:
                raise TokenizerError(
                    f"{self.path.parent} gives the added token {text!r} the id {token_id}, the vocabulary gives it "
                    f"{found}; the files are of different models"
                )

    def _post_processor_bos(self) -> int | None:
        """The id that the tokenizer's own post-processor puts before a text."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        processed = self._backend.encode("a", add_special_tokens=True).ids
        head = processed[: len(processed) - len(plain)]
        return head[0] if head and processed[1 : 1 + len(plain)] == plain else None


class IncrementalDecoder:
    """Turns token ids into text as they come. The pieces, joined, are what `Tokenizer.decode` gives for all of them."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, at_head: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._at_head = at_head and tokenizer._token_bytes.strips_leading_space
        self._first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; empty while a character is still incomplete."""
        special = self._tokenizer.is_special(token_id)
        if special and self._skip_special:
            self._first = False
            return ""
        piece = self._tokenizer.token_bytes(token_id)
        if self._at_head and piece:
            opening_bos = self._first and token_id == self._tokenizer.bos_token_id
            self._at_head = opening_bos
            if not special:
                piece = piece.removeprefix(b" ")
        self._first = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Ends the text: an incomplete character, if one is left, becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)

    def state(self) -> object:
        """Where it is, for `restore`."""
        return self._utf8.getstate(), self._at_head, self._first

    def restore(self, state: object) -> None:
        """Go back to where it was when `state` was asked for."""
        utf8, self._at_head, self._first = cast(tuple[tuple[bytes, int], bool, bool], state)
        self._utf8.setstate(utf8)


def _is_markup(token: dict[str, Any]) -> bool:
    """Whether an added token looks like a mark of structure ("<tool_call>"), not like text (runs of spaces)."""
    return _MARKUP.fullmatch(token["content"]) is not None


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def _build_backend(definition: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is not a tokenizer that can be read ({error}); download it again") from error


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normaliser, pre-tokenizer or decoder as a flat list of steps."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for inner in part[key] for step in _steps(inner, key)]
    return [part]


def _prepends_space(definition: dict[str, Any]) -> bool:
    normalizers = _steps(definition.get("normalizer"), "normalizers")
    pre_tokenizers = _steps(definition.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        step["type"] == "Metaspace"
        and step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
        for step in pre_tokenizers
    )


def _adds_prefix_space(definition: dict[str, Any]) -> bool:
    pre_tokenizers = _steps(definition.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "ByteLevel" and step.get("add_prefix_space") for step in pre_tokenizers)


def _without_prefix_space(definition: dict[str, Any]) -> dict[str, Any]:
    normalizers = [s for s in _steps(definition.get("normalizer"), "normalizers") if s["type"] != "Prepend"]
    pre_tokenizers = [_without_prefix_space_step(s) for s in _steps(definition.get("pre_tokenizer"), "pretokenizers")]
    return {
        **definition,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
    }


def _without_prefix_space_step(step: dict[str, Any]) -> dict[str, Any]:
    if step["type"] == "Metaspace":
        kept = {key: value for key, value in step.items() if key != "add_prefix_space"}
        return {**kept, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step

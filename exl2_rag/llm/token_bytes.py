"""What bytes a token stands for, in the two kinds of vocabulary that language models use.

Byte-level ones (GPT-2's way) write every byte as a printable character; SentencePiece ones write a space as "▁" and a
byte without a piece of its own as "<0x0A>". Which one it is stands in the decoder of `tokenizer.json`. This module
knows nothing of encoding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exl2_rag.errors import RequestError, TokenizerError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Bytes by token id, worked out when first asked for.

    Attributes:
        strips_leading_space: whether the vocabulary's own decoder drops a space at the head of a text.

    Raises:
        TokenizerError: the decoder does something else than the two kinds do.
    """

    def __init__(self, definition: dict[str, Any], id_to_token: Callable[[int], str | None], path: Path) -> None:
        self._id_to_token = id_to_token
        self._known: dict[int, bytes] = {}
        self._replacements: list[tuple[str, str]] = []
        self._byte_level = False
        self._byte_fallback = False
        self.strips_leading_space = False
        decoder = definition.get("decoder")
        if decoder is None:
            raise TokenizerError(f"{path} has no decoder, so its tokens have no text; copy the original model's file")
        for step in _flatten(decoder):
            self._read_step(step, path)
        self._added = {token["id"]: token for token in definition["added_tokens"]}

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._work_out(token_id)
        return known

    def _read_step(self, step: dict[str, Any], path: Path) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                return
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                self.strips_leading_space |= start == 1
            case {"type": "Metaspace", "replacement": str(mark)}:
                self._replacements.append((mark, " "))
                scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                self.strips_leading_space |= scheme != "never"
            case _:
                raise TokenizerError(
                    f"{path}: expected a byte-level or SentencePiece decoder, got the step {step}; "
                    "this kind of vocabulary is not supported"
                )

    def _work_out(self, token_id: int) -> bytes:
        if token_id < 0:
            raise RequestError(f"token ids are 0 or more, got {token_id}")
        added = self._added.get(token_id)
        if added is not None and (added.get("special") or self._byte_level):
            return str(added["content"]).encode()
        piece = self._id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            codes = [_BYTE_OF_CHARACTER.get(character) for character in piece]
            return bytes(code for code in codes if code is not None) if None not in codes else piece.encode()
        as_byte = _BYTE_PIECE.fullmatch(piece) if self._byte_fallback else None
        if as_byte is not None:
            return bytes([int(as_byte[1], 16)])
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        return piece.encode()


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write printable Latin-1 bytes as themselves, the others as characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_of_character()

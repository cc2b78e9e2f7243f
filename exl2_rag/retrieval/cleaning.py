"""What a document's text must not carry into a prompt: invisible characters, special tokens, our delimiter.

Cleaning happens once, at ingest; all offsets refer to the cleaned text. It is a security measure beside the tokenizer's
(document text is encoded with special tokens switched off), so it knows the common families of special tokens and needs
no tokenizer. Cleaning a cleaned text changes nothing.
"""

from __future__ import annotations

import re

CLEANING_VERSION = 1

# Zero-width, bidirectional control, deprecated format, interlinear and tag characters, variation selectors beyond the
# common sixteen, soft hyphen, byte order mark. None of them is seen by a reader; all of them reach a tokenizer.
_INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff0-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_CONTROLS = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff"
_DROPPED = re.compile(f"[{_INVISIBLE}{_CONTROLS}]")
_LINE_BREAK = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_SURROGATE = re.compile("[\ud800-\udfff]")

# A special token holds no white space, and every one found is replaced by a space. Hence no new one can arise from the
# text on either side, and one pass is enough.
_SPECIAL_TOKENS = (
    r"<[|｜][^\s<>|｜]{1,80}[|｜]>",  # <|im_start|>, <|eot_id|>, <｜end▁of▁sentence｜>
    r"</?s>|<(?:unk|pad|bos|eos|mask|cls|sep|eod|eot|eom|image|start_of_image|end_of_image)>",
    r"<(?:start|end)_of_turn>",
    r"\[/?(?:INST|SYS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|AVAILABLE_TOOLS|SYSTEM_PROMPT|MODEL_SETTINGS|THINK|IMG"
    r"|IMG_BREAK|IMG_END|PREFIX|MIDDLE|SUFFIX|ARGS|CALL_ID|PAD|UNK|CLS|SEP|MASK|gMASK|sMASK)\]",
    r"<</?SYS>>",
    r"</?(?:tool_call|tool_response|think)>",
    r"<(?:reserved|unused|extra_id|special)_?\d{1,5}>",
)
_BLANK_LINES = re.compile(r"\n{3,}")


def clean_text(text: str, *, delimiter: str = "") -> str:
    """Return `text` as it may be indexed, shown and put into a prompt.

    Line breaks become "\\n", exotic spaces a space, invisible and control characters vanish; special-token look-alikes
    and `delimiter` (in any case) become a space; spaces at line ends and blank lines beyond one vanish. Everything else
    stays as it was: no Unicode normalisation, no change of case, quotes or dashes.

    Args:
        text: any string, lone surrogates included.
        delimiter: the index's secret delimiter; empty for none.
    """
    text = _LINE_BREAK.sub("\n", text)
    text = _DROPPED.sub("", text)
    text = _SPACE.sub(" ", text)
    text = _SURROGATE.sub("\ufffd", text)
    text = _forbidden(delimiter).sub(" ", text)
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def clean_title(text: str, *, delimiter: str = "", max_chars: int = 120) -> str:
    """`text` cleaned, on one line, cut at a word to at most `max_chars` characters."""
    title = " ".join(clean_text(text, delimiter=delimiter).split())
    if len(title) <= max_chars:
        return title
    return title[: max_chars - 1].rsplit(" ", 1)[0].rstrip(" ,;:-–—") + "…"


def _forbidden(delimiter: str) -> re.Pattern[str]:
    patterns = [*_SPECIAL_TOKENS]
    if delimiter:
        patterns.insert(0, f"(?i:{re.escape(delimiter)})")
    return re.compile("|".join(patterns))

"""Plain text, Markdown, reStructuredText, AsciiDoc, WebVTT and source code, from bytes to lines that mean something.

Lines that an editor wrapped are joined again, so that a sentence can be quoted as one line; lines that stand for
themselves (lists, tables, verse, code) stay. reStructuredText and AsciiDoc headings are written the Markdown way.
"""

from __future__ import annotations

import codecs
import re
from itertools import pairwise

from exl2_rag.errors import DocumentError

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GUESSED_BYTES = 64 * 1024  # enough to tell an encoding; guessing on more is slow
_ASCII_CONTROLS = bytes(range(9)) + bytes(range(14, 27)) + bytes(range(28, 32))

_WRAPPED_LINE_CHARS = 45  # lines of wrapped prose are at least this long; addresses and verse seldom are
_RAGGED_CHARS = 15  # how much shorter than the width a full line may be
_LIST_MARKER = re.compile(r"\s*(?:[-*+•‣◦–]|\(?\d{1,3}[.)]|\(?[A-Za-z][.)])\s")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_MARKDOWN_STRUCTURE = re.compile(
    r"\s{4,}|\t|\s{0,3}(?:#{1,6}(?:\s|$)|>|\||<|\[[^\]]+\]:|(?:[-*_]\s*){3,}$|=+\s*$|-+\s*$|:{3,})|[^|]*\S \|(?: |$)"
)
_SETEXT = re.compile(r" {0,3}(=+|-+)\s*$")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*[\"']?(.+?)[\"']?[ \t]*$", re.MULTILINE)
_COMMENT = re.compile(r"<!--(?:(?!<!--).)*?-->", re.DOTALL)
_DATA_URI = re.compile(r"\(data:[^)\s]{64,}\)")


def decode_text(data: bytes) -> str:
    """Bytes of a text file as a string.

    Byte order mark first, then UTF-8, then a guess.

    Raises:
        DocumentError: binary data, or no encoding fits ("broken").
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _decode(data, encoding)
    sample = data[:_GUESSED_BYTES]
    if b"\x00" in sample or len(sample.translate(None, _ASCII_CONTROLS)) < 0.95 * len(sample):
        raise DocumentError("the file holds binary data, not text", reason="unsupported")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _decode(data, _guess_encoding(sample))


def _guess_encoding(sample: bytes) -> str:
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", sample)]
    if runs and runs.count(1) >= 0.9 * len(runs):
        return "cp1252"  # accents stand alone among plain letters; other scripts make runs
    from charset_normalizer import from_bytes

    best = from_bytes(sample).best()
    return best.encoding if best is not None else "cp1252"


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"the text is neither UTF-8 nor {encoding} ({error.reason} at byte {error.start}); save it as UTF-8",
            reason="broken",
        ) from error


def unwrap_plain(text: str) -> str:
    """Join lines that were wrapped at a fixed width; leave everything else."""
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", text.replace("\r\n", "\n").replace("\r", "\n"))
    split = [paragraph.strip("\n").split("\n") for paragraph in paragraphs]
    usual = _usual_width(split)
    return "\n\n".join("\n".join(_unwrap(lines, usual)) for lines in split)


def _usual_width(paragraphs: list[list[str]]) -> int:
    """The width at which the whole text seems wrapped; 0 if lines end at no common width."""
    lengths = sorted(len(line.strip()) for lines in paragraphs for line in lines[:-1])
    width = lengths[int(0.98 * len(lengths))] if lengths else 0
    full = sum(1 for length in lengths if width - _RAGGED_CHARS < length <= width)
    return width if width >= _WRAPPED_LINE_CHARS and full >= max(3, 0.4 * len(lengths)) else 0


def _unwrap(lines: list[str], usual: int) -> list[str]:
    if len(lines) < 2 or any(_tabular(line) for line in lines) or not all(map(str.strip, lines)):
        return lines
    stripped = [line.strip() for line in lines]
    own = max(len(line) for line in stripped)
    if all(_is_full(line, following, own) for line, following in pairwise(stripped)):
        usual = own  # even a single paragraph tells, if all of its lines are full
    if not usual:
        return lines
    out = [lines[0]]
    for above, line in pairwise(lines):
        same_margin = _indent(above) == _indent(line) or above is lines[0]  # the first may be indented
        if _is_full(above.strip(), line.strip(), usual) and same_margin and not _LIST_MARKER.match(line):
            out[-1] = join_lines([out[-1], line.strip()])
        else:
            out.append(line)
    return out


def _is_full(line: str, following: str, width: int) -> bool:
    """Would the first word of the following line have made this one longer than `width`?"""
    word = following.split(maxsplit=1)[0]
    return _WRAPPED_LINE_CHARS <= len(line) <= width and len(line) + 1 + len(word) > width - 2


def _tabular(line: str) -> bool:
    return "\t" in line.strip() or re.search(r"\S {3,}\S", line) is not None


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def join_lines(lines: list[str]) -> str:
    """Lines of one paragraph as one line; no space between two ideographs."""
    joined = lines[0]
    for line in lines[1:]:
        wide = joined[-1:] >= "\u3000" and line[:1] >= "\u3000" and joined[-1:] < "\uac00" and line[:1] < "\uac00"
        joined += line if wide else " " + line
    return joined


def read_markdown(text: str) -> tuple[str, str]:
    """Markdown made even: (title of the front matter or empty, text).

    Front matter and comments are dropped (a reader never sees them), inline images lose their data, underlined
    headings get the "#" form, and wrapped lines are joined.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    title = ""
    if front := _FRONT_MATTER.match(text):
        named = _FRONT_TITLE.search(front.group(1))
        title = named.group(1) if named else ""
        text = text[front.end() :]
    text = _DATA_URI.sub("()", _COMMENT.sub("", text))
    return title, _unwrap_markdown(text)


def _unwrap_markdown(text: str) -> str:
    out: list[str] = []
    parts: list[str] = []  # lines of the paragraph in progress
    fence = ""

    def flush() -> None:
        if parts:
            out.append(join_lines([parts[0].rstrip(), *(part.strip() for part in parts[1:])]))
            parts.clear()

    for line in text.split("\n"):
        marker = _FENCE.match(line)
        if fence or marker:
            flush()
            out.append(line)
            if not fence:
                fence = marker.group(1) if marker else ""
            elif marker and marker.group(1).startswith(fence) and line.strip() == marker.group(1):
                fence = ""
        elif len(parts) == 1 and (underline := _SETEXT.match(line)) and not _LIST_MARKER.match(parts[0]):
            out.append(("# " if underline.group(1)[0] == "=" else "## ") + parts.pop().strip())
        elif not line.strip() or (_MARKDOWN_STRUCTURE.match(line) and not (parts and line.startswith(" "))):
            flush()
            out.append(line)
        else:
            if _LIST_MARKER.match(line):
                flush()
            parts.append(line)
            if line.endswith(("  ", "\\")):  # a line break that is meant
                flush()
    flush()
    return "\n".join(out)


def read_restructured(text: str) -> str:
    """reStructuredText with its headings in the "#" form; directives and roles stay as they are."""
    lines = text.replace("\r\n", "\n").split("\n")
    levels: dict[str, int] = {}
    out: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        following = lines[index + 1] if index + 1 < len(lines) else ""
        if _is_underline(line) and index + 2 < len(lines) and lines[index + 2].strip() == line.strip():
            index += 1  # an overlined title; its underline is found next
            continue
        if line.strip() and not line.startswith(" ") and _is_underline(following, len(line.strip())):
            level = levels.setdefault(following[0], len(levels) + 1)
            out.extend(["", "#" * min(level, 6) + " " + line.strip(), ""])
            index += 2
            continue
        out.append(line)
        index += 1
    return unwrap_plain("\n".join(out))


def _is_underline(line: str, width: int = 3) -> bool:
    mark = line[:1]
    return len(line.rstrip()) >= max(3, width) and mark in "=-~^\"'#*+`.:_" and set(line.rstrip()) == {mark}


def read_asciidoc(text: str) -> str:
    """AsciiDoc with its headings in the "#" form."""
    text = re.sub(r"^(={1,6}) (?=\S)", lambda match: "#" * len(match.group(1)) + " ", text, flags=re.MULTILINE)
    return unwrap_plain(re.sub(r"^(#{1,6} .*)$", r"\n\1\n", text, flags=re.MULTILINE))


def read_subtitles(text: str) -> str:
    """WebVTT or SubRip as a transcript: one line a cue, times and styles dropped, the speaker before a colon."""
    out: list[str] = []
    for cue in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
        lines = cue.strip().split("\n")
        timed = next((index for index, line in enumerate(lines) if "-->" in line), None)
        if timed is None:
            continue
        spoken = " ".join(line.strip() for line in lines[timed + 1 :])
        spoken = re.sub(r"<v(?:\.[^ >]*)? ([^>]*)>", r"\1: ", spoken)
        spoken = re.sub(r"</?[a-z0-9.:]*(?: [^>]*)?>", "", spoken).strip()
        if spoken:
            out.append(spoken)
    return "\n".join(out)

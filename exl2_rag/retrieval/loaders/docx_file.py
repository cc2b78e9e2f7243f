"""Word files: headings, lists, tables, text boxes and notes out of the XML, without what a reader does not see.

Read by lxml, paragraph by paragraph: a converter that builds the whole document in Python objects takes minutes for a
few megabytes of hostile XML. Deleted and hidden text is left out. Elements are known by their local names, so that the
strict and the transitional form of the format read alike.
"""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from exl2_rag.retrieval.loaders.blocks import Kind, join_blocks
from exl2_rag.retrieval.loaders.container import core_title, guarded, open_container, read_member
from exl2_rag.retrieval.loaders.extracted import Budget, Extracted, broken
from exl2_rag.retrieval.loaders.formulas import formula_text
from exl2_rag.retrieval.loaders.tables import table_rows

MEDIA_TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"

Block = tuple[Kind, str]

_MAIN_PART = re.compile(rb'<[^>]*relationships/officeDocument"[^>]*>')
_TARGET = re.compile(rb'Target="/?([^"]+)"')
_CODE_STYLES = frozenset(["source code", "html preformatted", "preformatted text", "code", "code block", "macro text"])
_DROPPED = frozenset(
    [
        *(
            "pPr",
            "rPr",
            "tblPr",
            "trPr",
            "tcPr",
            "sectPr",
            "sdtPr",
            "del",
            "moveFrom",
            "delText",
            "instrText",
            "Fallback",
        ),
        *("rt", "softHyphen", "commentReference", "annotationRef", "footnoteRef", "endnoteRef"),
    ]
)
_MAX_LIST_DEPTH = 6


def read_docx(data: bytes, budget: Budget) -> Extracted:
    """Text of a Word file.

    Raises:
        DocumentError: "encrypted", "unsupported", "broken", "too-large" or "too-slow".
    """
    with open_container(data, budget) as container:
        names = frozenset(container.namelist())
        main = _main_part(container, names)
        folder = posixpath.dirname(main)

        def part(name: str) -> bytes | None:
            path = posixpath.join(folder, name)
            return read_member(container, path) if path in names else None

        title = core_title(container)
        styles, numbering = part("styles.xml"), part("numbering.xml")
        body = read_member(container, main)
        notes = [content for name in ("footnotes.xml", "endnotes.xml") if (content := part(name)) is not None]

    def convert() -> tuple[str, str]:
        reader = _Reader(budget, _Styles.parse(styles), _Numbering.parse(numbering))
        blocks = list(reader.read_part(body, "body"))
        for content in notes:
            blocks.extend(reader.read_part(content, "footnote", "endnote"))
        return join_blocks(blocks), reader.first_heading

    text, heading = guarded(convert)
    return Extracted((text,), MEDIA_TYPE, "markdown", heading or title)


def _main_part(container: zipfile.ZipFile, names: frozenset[str]) -> str:
    if "_rels/.rels" in names and (relation := _MAIN_PART.search(read_member(container, "_rels/.rels"))):
        target = _TARGET.search(relation.group())
        if target and target.group(1).decode("utf-8", "replace") in names:
            return target.group(1).decode("utf-8")
    if "word/document.xml" not in names:
        raise broken("it holds no word/document.xml")
    return "word/document.xml"


def _name(element: Any) -> str:
    """Local name; empty for comments and processing instructions, "oMath" only for formulas."""
    tag = element.tag
    if not isinstance(tag, str):
        return ""
    namespace, _, local = tag.rpartition("}")
    return f"m:{local}" if "/math" in namespace else local


def _child(element: Any, name: str) -> Any:
    return next((child for child in element if _name(child) == name), None) if element is not None else None


def _value(element: Any, name: str, attribute: str = "val") -> str | None:
    """The attribute of a child element, for example <w:pStyle w:val="Heading1"/>."""
    child = _child(element, name)
    if child is None:
        return None
    return next((value for key, value in child.attrib.items() if key.rpartition("}")[2] == attribute), "")


def _parse(content: bytes) -> Any:
    from lxml import etree  # type: ignore[import-untyped]

    return etree.fromstring(content, etree.XMLParser(resolve_entities=False, no_network=True))


@dataclass(frozen=True, slots=True)
class _Style:
    name: str
    based_on: str
    level: int  # outline level from 1; 0 is body text
    numbering: tuple[str, int] | None


@dataclass(frozen=True, slots=True)
class _Styles:
    """Paragraph styles by id."""

    by_id: dict[str, _Style] = field(default_factory=dict)

    @classmethod
    def parse(cls, content: bytes | None) -> _Styles:
        if content is None:
            return cls()
        styles: dict[str, _Style] = {}
        for element in _parse(content):
            if _name(element) != "style":
                continue
            style_id = next((value for key, value in element.attrib.items() if key.endswith("styleId")), "")
            properties = _child(element, "pPr")
            name = (_value(element, "name") or "").lower()
            named = re.fullmatch(r"heading ([1-9])", name)
            level = int(named.group(1)) if named else _outline_level(properties)
            based_on = _value(element, "basedOn") or ""
            styles[style_id] = _Style(name, based_on, 1 if name == "title" else level, _numbering_of(properties))
        return cls(styles)

    def chain(self, style_id: str | None) -> Iterator[_Style]:
        """The style and those it is based on."""
        seen: set[str] = set()
        while style_id and style_id in self.by_id and style_id not in seen:
            seen.add(style_id)
            yield self.by_id[style_id]
            style_id = self.by_id[style_id].based_on


def _outline_level(properties: Any) -> int:
    value = _value(properties, "outlineLvl")
    return int(value) + 1 if value and value.isdecimal() and int(value) < 9 else 0


def _numbering_of(properties: Any) -> tuple[str, int] | None:
    found = _child(properties, "numPr")
    if found is None:
        return None
    level = _value(found, "ilvl") or "0"
    return _value(found, "numId") or "", int(level) if level.isdecimal() else 0


@dataclass(slots=True)
class _Numbering:
    """Lists: which numbers and bullets there are, and how far each has counted."""

    formats: dict[tuple[str, int], str] = field(default_factory=dict)
    counts: dict[tuple[str, int], int] = field(default_factory=dict)

    @classmethod
    def parse(cls, content: bytes | None) -> _Numbering:
        numbering = cls()
        if content is None:
            return numbering
        abstract: dict[str, dict[int, str]] = {}
        for element in _parse(content):
            attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
            if _name(element) == "abstractNum":
                levels = [child for child in element if _name(child) == "lvl"]
                formats = {index: _value(level, "numFmt") or "decimal" for index, level in enumerate(levels)}
                abstract[attributes.get("abstractNumId", "")] = formats
            elif _name(element) == "num":
                for level, number_format in abstract.get(_value(element, "abstractNumId") or "", {}).items():
                    numbering.formats[attributes.get("numId", ""), level] = number_format
        return numbering

    def marker(self, number_id: str, level: int) -> str:
        """What stands before the next item: "- ", "3. ", indented by its level; empty if it is no list item."""
        number_format = self.formats.get((number_id, level), "bullet" if number_id not in ("", "0") else "none")
        if number_format == "none":
            return ""
        indent = "  " * min(level, _MAX_LIST_DEPTH)
        if number_format == "bullet":
            return indent + "- "
        for deeper in [key for key in self.counts if key[0] == number_id and key[1] > level]:
            del self.counts[deeper]
        self.counts[number_id, level] = self.counts.get((number_id, level), 0) + 1
        return f"{indent}{self.counts[number_id, level]}. "


class _Reader:
    """Turns body elements into blocks."""

    def __init__(self, budget: Budget, styles: _Styles, numbering: _Numbering) -> None:
        self._budget = budget
        self._styles = styles
        self._numbering = numbering
        self.first_heading = ""

    def read_part(self, content: bytes, *containers: str) -> Iterator[Block]:
        """Blocks of a part, element by element, so that a large one is never in memory whole."""
        from lxml import etree

        depth = 0
        code: list[str] = []
        events = etree.iterparse(BytesIO(content), events=("start", "end"), resolve_entities=False, no_network=True)
        for event, element in events:
            inside = element.getparent() is not None and _name(element.getparent()) in containers
            if event == "start":
                depth += inside
                continue
            if not inside:
                continue
            depth -= 1
            if depth:
                continue
            for kind, text in self._blocks(element):
                if kind == "listing":
                    code.append(text)
                    continue
                if code:
                    yield "listing", _fenced(code)
                    code = []
                yield kind, text
            self._budget.check_time()
            element.clear()
            while element.getprevious() is not None:
                del element.getparent()[0]
        if code:
            yield "listing", _fenced(code)

    def _blocks(self, element: Any) -> Iterator[Block]:
        name = _name(element)
        if name == "p":
            yield from self._paragraph(element)
        elif name == "tbl":
            yield from self._table(element)
        elif name == "AlternateContent":
            choice = _child(element, "Choice")
            for child in choice if choice is not None else ():
                yield from self._blocks(child)
        elif name == "m:oMathPara":
            yield "text", formula_text(element).strip()
        elif name not in _DROPPED and name != "m:oMath":
            for child in element:
                yield from self._blocks(child)

    def _paragraph(self, element: Any) -> Iterator[Block]:
        properties = _child(element, "pPr")
        boxes: list[Any] = []
        text = re.sub(r" ?\n ?", "\n", re.sub(r"[ \t]+", " ", "".join(self._inline(element, boxes))))
        self._budget.spend_text(text)
        styles = list(self._styles.chain(_value(properties, "pStyle")))
        if any(style.name in _CODE_STYLES for style in styles[:1]):
            yield "listing", "".join(self._inline(element, [])).rstrip()
        elif text.strip():
            yield self._styled(text.strip(), properties, styles)
        for box in boxes:
            for child in box:
                yield from self._blocks(child)

    def _styled(self, text: str, properties: Any, styles: list[_Style]) -> Block:
        level = _outline_level(properties) or next((style.level for style in styles if style.level), 0)
        if level:
            heading = " ".join(text.split())
            if level == 1 and not self.first_heading:
                self.first_heading = heading
            return "text", "#" * min(level, 6) + " " + heading
        numbering = _numbering_of(properties) or next((style.numbering for style in styles if style.numbering), None)
        marker = self._numbering.marker(*numbering) if numbering else ""
        return ("item", marker + text) if marker else ("text", text)

    def _inline(self, element: Any, boxes: list[Any]) -> Iterator[str]:
        for child in element:
            name = _name(child)
            if name == "t":
                yield child.text or ""
            elif name in ("tab", "ptab"):
                yield " "
            elif name in ("br", "cr"):
                yield "\n"
            elif name == "noBreakHyphen":
                yield "-"
            elif name in ("m:oMath", "m:oMathPara"):
                yield f" {formula_text(child).strip()} "
            elif name == "txbxContent":
                boxes.append(child)
            elif name == "AlternateContent":
                choice = _child(child, "Choice")
                if choice is not None:
                    yield from self._inline(choice, boxes)
            elif name == "r" and _child(_child(child, "rPr"), "vanish") is not None:
                continue  # hidden text
            elif name and name not in _DROPPED:
                yield from self._inline(child, boxes)

    def _table(self, element: Any) -> Iterator[Block]:
        rows = [list(_found(row, "tc")) for row in _found(element, "tr")]
        if max((len(row) for row in rows), default=0) == 1:  # a frame around text rather than a table
            for row in rows:
                for cell in row:
                    for child in cell:
                        yield from self._blocks(child)
            return
        texts = [[" ".join(text for _, text in self._cell(cell)) for cell in row] for row in rows]
        if table := table_rows(texts):
            yield "row", table

    def _cell(self, cell: Any) -> Iterator[Block]:
        for child in cell:
            for kind, text in self._blocks(child):
                flat = text.replace("|", " ") if kind == "row" else re.sub(r"^\s*#{1,6} ", "", text)
                yield kind, " ".join(flat.split())


def _found(element: Any, name: str) -> Iterator[Any]:
    """Children of that name, content controls seen through."""
    for child in element:
        if _name(child) == name:
            yield child
        elif _name(child) in ("sdt", "sdtContent", "customXml", "ins"):
            yield from _found(child, name)


def _fenced(lines: list[str]) -> str:
    return "```\n" + "\n".join(lines).strip("\n") + "\n```"

"""Formulas of Word files (Office Math) as text on one line: (a)/(b), x^(2), x_(i), √(x)."""

from __future__ import annotations

from typing import Any

_MATH = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"


def linearise_formulas(content: bytes) -> bytes:
    """Replace every formula of a Word XML part by an ordinary run of text."""
    from lxml import etree  # type: ignore[import-untyped]

    root = etree.fromstring(content, etree.XMLParser(resolve_entities=False, no_network=True))
    for formula in list(root.iter(f"{_MATH}oMath")):
        run = etree.Element(f"{_WORD}r")
        text = etree.SubElement(run, f"{_WORD}t")
        text.text = " " + _formula_text(formula) + " "
        text.tail = formula.tail
        target = formula
        parent = formula.getparent()
        if parent is not None and parent.tag == f"{_MATH}oMathPara" and parent.getparent() is not None:
            target, parent = parent, parent.getparent()
            if parent.tag != f"{_WORD}p":  # a displayed formula of its own
                paragraph = etree.Element(f"{_WORD}p")
                paragraph.append(run)
                run = paragraph
        if parent is not None and target.getparent() is parent:
            parent.insert(parent.index(target), run)
            if target is formula or target[-1] is formula:
                parent.remove(target)
    return bytes(etree.tostring(root, encoding="utf-8", xml_declaration=True))


def _formula_text(node: Any) -> str:
    """A formula on one line: (a)/(b), x^(2), x_(i), √(x)."""
    parts = {child.tag: _formula_text(child) for child in node if isinstance(child.tag, str)}

    def part(name: str) -> str:
        text = parts.get(f"{_MATH}{name}", "").strip()
        return text if len(text) <= 1 else f"({text})"

    name = str(node.tag).removeprefix(_MATH)
    if name == "t":
        return node.text or ""
    if name == "f":
        return f"{part('num')}/{part('den')}"
    if name in ("sSup", "sSub", "sSubSup"):
        lower = f"_{part('sub')}" if f"{_MATH}sub" in parts else ""
        upper = f"^{part('sup')}" if f"{_MATH}sup" in parts else ""
        return parts.get(f"{_MATH}e", "") + lower + upper
    if name == "rad":
        return f"√{part('e')}"
    return "".join(_formula_text(child) for child in node if isinstance(child.tag, str))

"""Formulas of Word files (Office Math) as text on one line: (a)/(b), x^(2), x_(i), √(x)."""

from __future__ import annotations

from typing import Any


def formula_text(node: Any) -> str:
    """A formula on one line: (a)/(b), x^(2), x_(i), √(x)."""
    texts = [(_local(child), formula_text(child)) for child in node]
    parts = dict(texts)

    def part(name: str) -> str:
        text = parts.get(name, "").strip()
        return text if len(text) <= 1 else f"({text})"

    name = _local(node)
    if name == "t":
        return str(node.text or "")
    if name == "f":
        return f"{part('num')}/{part('den')}"
    if name in ("sSup", "sSub", "sSubSup"):
        lower = f"_{part('sub')}" if "sub" in parts else ""
        upper = f"^{part('sup')}" if "sup" in parts else ""
        return parts.get("e", "") + lower + upper
    if name == "rad":
        return f"√{part('e')}"
    return "".join(text for _, text in texts)


def _local(node: Any) -> str:
    """Name without its namespace; empty for comments."""
    return node.tag.rpartition("}")[2] if isinstance(node.tag, str) else ""

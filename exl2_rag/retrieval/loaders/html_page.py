"""HTML (EPUB chapters and e-mail bodies too) as text with Markdown structure.

Own walk over the tree instead of an HTML-to-Markdown converter, for two reasons: a quote must read as it does on the
page, so nothing inside a sentence is escaped or marked up; and a page nested 100,000 deep must not exhaust the stack.
What a reader does not see (scripts, styles, hidden elements) or does not read (navigation, footers, forms) is left out.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from bs4 import BeautifulSoup
from bs4.element import CData, NavigableString, Tag

from exl2_rag.retrieval.loaders.blocks import Kind, join_blocks
from exl2_rag.retrieval.loaders.extracted import Budget
from exl2_rag.retrieval.loaders.plain_text import unwrap_plain

_DROPPED = frozenset(
    [
        *("script", "style", "noscript", "template", "head", "nav", "footer", "iframe", "object", "embed", "svg"),
        *("canvas", "audio", "video", "button", "input", "select", "textarea", "datalist", "dialog", "map", "rt", "rp"),
        "annotation",
    ]
)
_DROPPED_ROLES = frozenset(
    ["navigation", "contentinfo", "search", "banner", "menu", "menubar", "dialog", "alertdialog"]
)
_DROPPED_CLASSES = frozenset(
    ["mw-editsection", "mw-portlet", "reference", "mw-jump-link", "navbox", "noprint", "sr-only"]
)
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden|font-size\s*:\s*0(?![.\d])", re.IGNORECASE)
_BLOCKS = frozenset(
    [
        *("p", "div", "section", "article", "main", "header", "aside", "body", "html", "blockquote", "center", "hr"),
        *("address", "figure", "figcaption", "caption", "fieldset", "legend", "form", "details", "summary", "hgroup"),
        *("ul", "ol", "dl", "dt", "dd", "li", "table", "thead", "tbody", "tfoot", "tr", "pre", "listing", "option"),
        *("h1", "h2", "h3", "h4", "h5", "h6", "title", "td", "th"),
    ]
)
_HEADING = re.compile(r"h[1-6]")
_FENCED_LINES = 60  # a longer <pre> is a document of its own (an RFC), not a listing


def html_to_text(markup: bytes | str, budget: Budget) -> tuple[str, str]:
    """Text of a page with Markdown headings, lists, tables and listings.

    Returns:
        (title, text); the title is the first level-one heading, else <title>, else empty.

    Raises:
        DocumentError: the markup is beyond the limits of `budget`.
    """
    budget.check_markup(markup)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it looks like XML, or like a file name
        soup = BeautifulSoup(markup, "lxml")
    root = _content_root(soup)
    writer = _Writer(budget, _layout_tables(root))
    _walk(root, writer)
    writer.flush()
    page_title = soup.title.get_text(" ") if soup.title is not None else ""
    return writer.first_heading or " ".join(page_title.split()), writer.text()


def _content_root(soup: BeautifulSoup) -> Tag:
    """The page's main part if it says which that is, else all of it."""
    for selector in ("main", '[role="main"]', "article"):
        found = soup.select(selector, limit=2)
        if len(found) == 1 and found[0].get_text(strip=True):
            return found[0]
    return soup


def _layout_tables(root: Tag) -> frozenset[int]:
    """Ids of tables that lay out a page: they hold tables, main headings or listings. Any other is a grid of values.

    One pass over the tree; asking each table for its descendants would take quadratic time where tables are nested.
    """
    layout: set[int] = set()
    open_tables: list[int] = []
    stack: list[Iterator[object] | Tag] = [iter([root])]
    while stack:
        top = stack[-1]
        if isinstance(top, Tag):
            if top.name == "table":
                open_tables.pop()
            stack.pop()
            continue
        node = next(top, None)
        if node is None:
            stack.pop()
        elif isinstance(node, Tag):
            if node.name in ("table", "h1", "h2", "pre") and open_tables:
                layout.add(open_tables[-1])
            if node.name == "table":
                open_tables.append(id(node))
                if node.get("role") in ("presentation", "none"):
                    layout.add(id(node))
            stack.extend((node, iter(node.contents)))
    return frozenset(layout)


def _walk(root: Tag, writer: _Writer) -> None:
    stack: list[Iterator[object] | Tag] = [iter([root])]
    while stack:
        top = stack[-1]
        if isinstance(top, Tag):
            writer.leave(top)
            stack.pop()
            continue
        node = next(top, None)
        if node is None:
            stack.pop()
        elif isinstance(node, Tag):
            if not _is_dropped(node) and not (writer.in_header and node.name in ("ul", "ol")):
                writer.enter(node)
                stack.extend((node, iter(node.contents)))
        elif isinstance(node, CData) or type(node) is NavigableString:
            writer.write(str(node))


def _is_dropped(tag: Tag) -> bool:
    if tag.name in _DROPPED or tag.has_attr("hidden"):
        return True
    if not tag.attrs:
        return False
    return (
        str(tag.get("role", "")).lower() in _DROPPED_ROLES
        or not _DROPPED_CLASSES.isdisjoint(tag.get_attribute_list("class"))
        or _HIDDEN_STYLE.search(str(tag.get("style", ""))) is not None
    )


@dataclass(slots=True)
class _Writer:
    """Collects inline text into paragraphs, items, rows and listings."""

    budget: Budget
    layout_tables: frozenset[int]
    first_heading: str = ""
    _parts: list[tuple[Kind, str]] = field(default_factory=list)
    _inline: list[str] = field(default_factory=list)
    _lists: list[int] = field(default_factory=list)  # open lists: 0 unordered, else the next number
    _marker: str = ""  # waits for the first text of a list item
    _rows: list[list[str]] = field(default_factory=list)  # open rows of tables: finished cells
    _tables: list[bool] = field(default_factory=list)  # open tables: is it a grid of values?
    _cells: int = 0
    _pre: int = 0
    _headers: int = 0

    @property
    def in_header(self) -> bool:
        """Inside a <header>, where a list is a menu."""
        return self._headers > 0

    def enter(self, tag: Tag) -> None:
        name = tag.name
        self._headers += name == "header"
        if name == "br":
            self._inline.append(" " if self._cells else "\n")
        elif name == "img":
            self._write_formula(tag)
        elif name == "table":
            self._tables.append(id(tag) not in self.layout_tables and not self._rows)
        if name not in _BLOCKS:
            return
        self._break()
        if name in ("ul", "ol"):
            self._lists.append(1 if name == "ol" else 0)
        elif name == "li" and not self._cells:
            self._marker = self._next_marker()
        elif name == "tr" and self._in_grid() and not self._cells:
            self._rows.append([])
        elif name in ("td", "th") and self._rows:
            self._cells += 1
        elif name in ("pre", "listing"):
            self._pre += 1

    def leave(self, tag: Tag) -> None:
        name = tag.name
        self._headers -= name == "header"
        if name not in _BLOCKS:
            return
        if name in ("td", "th") and self._cells:
            self._cells -= 1
            if not self._cells:
                self._rows[-1].append(_one_line("".join(self._inline)))
                self._inline.clear()
        elif name == "tr" and self._rows and not self._cells:
            self._end_row(self._rows.pop())
        elif _HEADING.fullmatch(name) and not self._cells:
            self._end_heading(int(name[1]))
        elif name in ("pre", "listing"):
            self._pre -= 1
            if not self._pre and not self._cells:
                self._end_listing()
        elif name in ("dt", "dd") and not self._cells:
            self.flush("definition")
        self._break()
        if name in ("ul", "ol") and self._lists:
            self._lists.pop()
        elif name == "li":
            self._marker = ""
        elif name == "table":
            self._tables.pop()

    def write(self, text: str) -> None:
        self._inline.append(text if self._pre and not self._cells else text.replace("\n", " ").replace("\r", " "))

    def flush(self, kind: Kind = "text") -> None:
        """End the paragraph in progress."""
        if self._pre and not self._cells:
            return
        text = re.sub(r" ?\n ?", "\n", re.sub(r"[ \t\f]+", " ", "".join(self._inline))).strip()
        self._inline.clear()
        if not text:
            return
        if self._marker:
            self._add("item", self._marker + text)
            self._marker = ""
        else:
            self._add(kind, text)

    def text(self) -> str:
        """Everything written so far; neighbouring items, rows and definitions stand on neighbouring lines."""
        return join_blocks(self._parts)

    def _break(self) -> None:
        if self._cells:
            self._inline.append(" ")
        else:
            self.flush()

    def _add(self, kind: Kind, text: str) -> None:
        self.budget.spend_text(text)
        self._parts.append((kind, text))

    def _next_marker(self) -> str:
        depth = min(max(0, len(self._lists) - 1), 6)
        number = self._lists[-1] if self._lists else 0
        if number:
            self._lists[-1] += 1
        return "  " * depth + (f"{number}. " if number else "- ")

    def _in_grid(self) -> bool:
        return bool(self._tables) and self._tables[-1]

    def _end_row(self, cells: list[str]) -> None:
        filled = [cell for cell in cells if cell]
        if len(filled) == 1 and len(cells) == 1:
            self._add("row", filled[0])
        elif filled:
            self._add("row", "| " + " | ".join(cells) + " |")

    def _end_heading(self, level: int) -> None:
        heading = _one_line("".join(self._inline))
        self._inline.clear()
        self._marker = ""
        if heading:
            self._add("text", "#" * level + " " + heading)
            if level == 1 and not self.first_heading:
                self.first_heading = heading

    def _end_listing(self) -> None:
        listing = "".join(self._inline).replace("\r\n", "\n").strip("\n").expandtabs(4)
        listing = textwrap.dedent(listing).rstrip()
        self._inline.clear()
        if not listing.strip():
            return
        if listing.count("\n") > _FENCED_LINES:
            self._add("text", unwrap_plain(listing))
        elif "\n" in listing or not self._marker:
            self._add("listing", f"```\n{listing}\n```")
        else:
            self._add("item", self._marker + listing)
            self._marker = ""

    def _write_formula(self, image: Tag) -> None:
        """A formula shown as an image carries its text in `alt`; other images' texts are left out."""
        classes = " ".join(map(str, image.get_attribute_list("class")))
        if re.search(r"math|latex|\btex\b", classes) and image.get("alt"):
            self.write(" " + str(image["alt"]) + " ")


def _one_line(text: str) -> str:
    return " ".join(text.split())

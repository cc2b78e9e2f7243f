"""EPUB, XML (feeds included), e-mail and notebooks: formats that wrap HTML, text or both."""

from __future__ import annotations

import email
import email.policy
import json
import posixpath
import re
from email.message import EmailMessage
from urllib.parse import unquote

from bs4 import BeautifulSoup
from bs4.element import CData, NavigableString, Tag

from exl2_rag.retrieval.loaders.container import open_container, read_member
from exl2_rag.retrieval.loaders.extracted import Budget, Extracted, broken
from exl2_rag.retrieval.loaders.html_page import html_to_text
from exl2_rag.retrieval.loaders.plain_text import decode_text, read_markdown, unwrap_plain

_LOOKS_LIKE_HTML = re.compile(r"<(?:p|div|br|ul|ol|h[1-6]|table|a|img|span)\b[^>]*>", re.IGNORECASE)


def read_html(data: bytes, budget: Budget) -> Extracted:
    """Text of an HTML page."""
    title, text = html_to_text(data, budget)
    return Extracted((text,), "text/html", "markdown", title)


def read_epub(data: bytes, budget: Budget) -> Extracted:
    """Text of a book, chapters in reading order."""
    with open_container(data, budget) as container:
        root = BeautifulSoup(read_member(container, "META-INF/container.xml"), "xml").find("rootfile")
        if not isinstance(root, Tag) or not root.get("full-path"):
            raise broken("META-INF/container.xml names no package file")
        package_path = str(root["full-path"])
        package = BeautifulSoup(read_member(container, package_path), "xml")
        files = {str(item.get("id")): str(item.get("href", "")) for item in package.find_all("item")}
        chapters: list[str] = []
        for reference in package.find_all("itemref"):
            href = unquote(files.get(str(reference.get("idref")), ""))
            name = posixpath.normpath(posixpath.join(posixpath.dirname(package_path), href))
            if href and name in container.namelist():
                chapters.append(html_to_text(read_member(container, name), budget)[1])
        title = package.find("title")
    text = "\n\n".join(chapter for chapter in chapters if chapter)
    return Extracted((text,), "application/epub+zip", "markdown", title.get_text(strip=True) if title else "")


def read_xml(data: bytes, budget: Budget) -> Extracted:
    """Text of an XML file: a paragraph for every element that holds text; HTML inside an element is read as HTML."""
    budget.check_markup(data)
    soup = BeautifulSoup(data, "xml")
    if soup.find(True) is None:
        raise broken("it is not well-formed XML")
    paragraphs: list[str] = []
    title = ""
    for element in soup.find_all(True):
        own = "".join(
            str(child) for child in element.children if isinstance(child, CData) or type(child) is NavigableString
        ).strip()
        if not own:
            continue
        if _LOOKS_LIKE_HTML.search(own):
            own = html_to_text(own, budget)[1]
        else:
            own = " ".join(own.split())
            budget.spend_text(own)
        if element.name == "title":
            title = title or own
            own = "# " + own
        paragraphs.append(own)
    return Extracted(("\n\n".join(paragraphs),), "application/xml", "markdown", title)


def read_email(data: bytes, budget: Budget) -> Extracted:
    """Text of a message: sender, recipients, date, then the body; attachments are named, not read."""
    try:
        message = email.message_from_bytes(data, policy=email.policy.default)
        assert isinstance(message, EmailMessage)
        subject = str(message.get("Subject", ""))
        parts = [f"{name}: {message[name]}" for name in ("From", "To", "Cc", "Date") if message.get(name)]
        head = "\n".join(parts)
        body = message.get_body(preferencelist=("plain", "html"))
        content = str(body.get_content()) if body is not None else ""
        names = [part.get_filename() or part.get_content_type() for part in message.iter_attachments()]
    except (LookupError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise broken(f"not an e-mail message ({type(error).__name__}: {error})") from error
    if not head and not subject:
        raise broken("it has no From, To, Date or Subject")
    if body is not None and body.get_content_type() == "text/html":
        content = html_to_text(content, budget)[1]
    else:
        content = unwrap_plain(content)
    attachments = "Attachments: " + ", ".join(names) if names else ""
    text = "\n\n".join(part for part in (head, content.strip(), attachments) if part)
    budget.spend_text(text)
    return Extracted((text,), "message/rfc822", "plain", subject)


def read_notebook(data: bytes, budget: Budget) -> Extracted:
    """Text and code of a Jupyter notebook; outputs are left out."""
    try:
        cells = json.loads(decode_text(data))["cells"]
        parts = []
        for cell in cells:
            source = cell["source"]
            source = source if isinstance(source, str) else "".join(source)
            parts.append(read_markdown(source)[1] if cell["cell_type"] == "markdown" else f"```\n{source}\n```")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise broken(f"not a notebook ({type(error).__name__}: {error})") from error
    text = "\n\n".join(part for part in parts if part.strip("`\n "))
    budget.spend_text(text)
    return Extracted((text,), "application/x-ipynb+json", "markdown")

"""Zip containers (docx, pptx, xlsx, epub) opened with suspicion: sizes are checked before anything is unpacked."""

from __future__ import annotations

import html
import re
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import TypeVar

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval.loaders.extracted import Budget, broken, too_large

_T = TypeVar("_T")
_OLE_MAGIC = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ENCRYPTED_STREAM = "EncryptedPackage".encode("utf-16-le")
_MAX_MEMBERS = 20_000
_TEXT_SUFFIXES = (".xml", ".rels", ".html", ".xhtml", ".htm", ".opf", ".ncx", ".vml")
_MEDIA_FACTOR = 8  # pictures are not parsed, so they may be this many times larger than what is


def open_container(data: bytes, budget: Budget) -> zipfile.ZipFile:
    """Open a zip container whose sizes are within bounds.

    The declared sizes can be trusted: `zipfile` never unpacks more of a member than its header declares.

    Raises:
        DocumentError: "encrypted", "unsupported" (an old binary Office file), "broken" or "too-large".
    """
    if data.startswith(_OLE_MAGIC):
        if _ENCRYPTED_STREAM in data:
            raise DocumentError("the file is encrypted; save it without a password", reason="encrypted")
        raise DocumentError("this is an old binary Office file; save it in the current format", reason="unsupported")
    try:
        container = zipfile.ZipFile(BytesIO(data))
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise broken(f"not a zip container ({error})") from error
    members = container.infolist()
    if len(members) > _MAX_MEMBERS:
        raise too_large(f"{len(members):,} members, more than {_MAX_MEMBERS:,}")
    if any(member.flag_bits & 1 for member in members):
        raise DocumentError("the file is encrypted; save it without a password", reason="encrypted")
    parsed = sum(member.file_size for member in members if member.filename.lower().endswith(_TEXT_SUFFIXES))
    budget.check_unpacked(parsed)
    budget.check_unpacked(sum(member.file_size for member in members) // _MEDIA_FACTOR)
    return container


def read_member(container: zipfile.ZipFile, name: str) -> bytes:
    """Unpack one member.

    Raises:
        DocumentError: it is missing or damaged ("broken").
    """
    try:
        return container.read(name)
    except (KeyError, zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise broken(f"{name}: {error}") from error
    except Exception as error:  # zlib.error and lzma.LZMAError have no common base
        if type(error).__module__ in ("zlib", "_lzma", "lzma"):
            raise broken(f"{name}: {error}") from error
        raise


def core_title(container: zipfile.ZipFile) -> str:
    """The title in an Office file's properties; empty if there is none."""
    if "docProps/core.xml" not in container.namelist():
        return ""
    found = re.search(rb"<dc:title[^>]*>([^<]{1,500})</dc:title>", read_member(container, "docProps/core.xml"))
    if found is None:
        return ""
    return html.unescape(found.group(1).decode("utf-8", errors="replace")).strip()


def guarded(convert: Callable[[], _T]) -> _T:
    """Whatever a parser throws at a damaged file becomes one DocumentError."""
    try:
        return convert()
    except DocumentError:
        raise
    except MemoryError as error:
        raise DocumentError("reading it takes more memory than there is", reason="too-large") from error
    except Exception as error:  # these libraries raise nearly anything on damaged files
        raise broken(f"{type(error).__name__}: {error}") from error

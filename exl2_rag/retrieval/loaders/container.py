"""Zip containers (docx, pptx, xlsx, epub) opened with suspicion: sizes are checked before anything is unpacked."""

from __future__ import annotations

import zipfile
from io import BytesIO

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval.loaders.extracted import Budget, broken, too_large

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

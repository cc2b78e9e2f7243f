"""Files made to harm: every one ends as a document or as a counted refusal, soon and within bounded memory."""

from __future__ import annotations

import io
import json
import os
import random
import time
import zipfile
from pathlib import Path

import pytest

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval import LoadLimits, load_document
from tests.retrieval.loaders.make_files import column, docx, paragraph, pdf, zipped

REASONS = {"unsupported", "encrypted", "broken", "empty", "no-text-layer", "too-large", "too-slow", "unreadable"}
SUFFIXES = [
    *(".pdf", ".docx", ".pptx", ".xlsx", ".epub", ".html", ".xml", ".eml", ".ipynb", ".md", ".txt", ".csv", ".rst"),
    *(".vtt", ".adoc", ".py", ".doc", ".xls", ".unknown", ""),
]


def reason_of(path: Path, data: bytes, **limits) -> str:
    path.write_bytes(data)
    with pytest.raises(DocumentError) as caught:
        load_document(path, root=path.parent, limits=LoadLimits(**limits))
    assert caught.value.reason in REASONS
    assert path.name in str(caught.value)
    return caught.value.reason


def outcome_of(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    try:
        document = load_document(path, root=path.parent)
    except DocumentError as error:
        return error.reason
    assert "root:" not in document.text, "an external entity was read"
    assert len(document.text) < 10_000_000
    return "read"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_bytes_under_any_name_are_refused(tmp_path, suffix) -> None:
    data = b"\x00\xff" + random.Random(1).randbytes(5000)
    if suffix == ".html":  # has no signature: words may be found in noise
        assert outcome_of(tmp_path / "file.html", data) in {*REASONS, "read"}
    else:
        reason_of(tmp_path / f"file{suffix}", data)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_is_empty(tmp_path, suffix) -> None:
    assert reason_of(tmp_path / f"a{suffix}", b" \n\t ") == "empty"


@pytest.mark.parametrize("suffix", [".doc", ".xls", ".ppt", ".msg", ".rtf"])
def test_old_formats_are_unsupported_and_the_message_names_a_way(tmp_path, suffix) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"x" * 100)
    with pytest.raises(DocumentError, match="save it as") as caught:
        load_document(path, root=tmp_path)
    assert caught.value.reason == "unsupported"


def test_an_encrypted_office_file_is_named_so(tmp_path) -> None:
    data = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 500 + "EncryptedPackage".encode("utf-16-le")
    assert reason_of(tmp_path / "a.docx", data) == "encrypted"
    assert reason_of(tmp_path / "a.xlsx", data.replace(b"E\0n\0c", b"x\0n\0c")) == "unsupported"


@pytest.mark.parametrize("name", ["a.docx", "a.pptx", "a.xlsx", "a.epub"])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, name) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as container:
        for number in range(4):
            container.writestr(f"word/document{number or ''}.xml", b"\0" * (20 << 20))
    assert len(out.getvalue()) < 200_000
    started = time.monotonic()
    assert reason_of(tmp_path / name, out.getvalue()) == "too-large"
    assert time.monotonic() - started < 5


def test_a_member_larger_than_it_says_is_broken(tmp_path) -> None:
    data = docx(paragraph("x" * 100_000))
    with zipfile.ZipFile(io.BytesIO(data)) as container:
        size = container.getinfo("word/document.xml").file_size
    lying = data.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little"))
    assert lying != data
    assert reason_of(tmp_path / "a.docx", lying) == "broken"


def test_a_file_beyond_the_limits_is_refused_whole(tmp_path) -> None:
    assert reason_of(tmp_path / "a.txt", b"x" * 2000, file_bytes=1000) == "too-large"
    assert reason_of(tmp_path / "a.txt", b"word " * 2000, text_chars=1000) == "too-large"
    assert reason_of(tmp_path / "a.csv", b"a,b,c\n" * 2000, cells=1000) == "too-large"
    assert reason_of(tmp_path / "a.docx", docx(paragraph("text") * 100), seconds=-1.0) == "too-slow"


DEEP = 5000
ENTITIES = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaaaaaaaaaaaa">'
    + "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 20}">' for i in range(8))
    + "]>"
)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("deep.docx", docx("<w:tbl><w:tr><w:tc>" * DEEP + paragraph("x") + "</w:tc></w:tr></w:tbl>" * DEEP)),
        ("deep.xml", b"<a>" * DEEP + b"x" + b"</a>" * DEEP),
        ("deep.html", b"<table><tr><td>" * DEEP + b"x"),
        ("lists.html", b"<ul><li>" * DEEP + b"x"),
        ("quotes.html", b"<blockquote><ol><li>x" * DEEP),
        ("deep.ipynb", b'{"cells":' + b"[" * 100_000),
        ("deep.json", b"[" * 100_000),
        ("deep.md", b">" * 50_000 + b" x\n" + b"- " * 50_000 + b"x\n" + b"[" * 50_000),
        ("fences.md", b"```\n" * 20_000),
        ("entities.xml", f"{ENTITIES}<x>&i;</x>".encode()),
        ("entities.docx", zipped({"word/document.xml": f"{ENTITIES}<x>&i;</x>"})),
        (
            "entities.xlsx",
            zipped(
                {"[Content_Types].xml": f"{ENTITIES}<Types>&i;</Types>", "xl/workbook.xml": f"{ENTITIES}<x>&i;</x>"}
            ),
        ),
        ("external.xml", b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>'),
        (
            "external.docx",
            zipped({"word/document.xml": '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>'}),
        ),
        ("long-line.txt", b"x" * 3_000_000),
        ("spaces.txt", b" " * 3_000_000 + b"x"),
        ("lines.txt", b"\n \n" * 500_000 + b"x"),
        ("quotes.csv", b'"' * 100_001),
        ("bomb.pdf", pdf([column(["text"])], extra=b" " * (50 << 20))),
        ("loop.pdf", pdf([column(["text"])]).replace(b"/Parent 2 0 R", b"/Kids [2 0 R]")),
        ("many-lines.pdf", pdf([[(72, 800 - row % 700, 5, "x") for row in range(20_000)]])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_made_to_exhaust_the_reader_ends_soon(tmp_path, name, data) -> None:
    started = time.process_time()
    assert outcome_of(tmp_path / name, data) in {*REASONS, "read"}
    assert time.process_time() - started < 20


def test_a_pipe_is_refused_and_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DocumentError, match="not a plain file"):
        load_document(tmp_path / "pipe.txt", root=tmp_path)


def test_a_file_that_is_gone_or_forbidden_is_unreadable(tmp_path) -> None:
    with pytest.raises(DocumentError) as caught:
        load_document(tmp_path / "none.txt", root=tmp_path)
    assert caught.value.reason == "unreadable"


def test_damaged_files_of_every_format_never_do_worse_than_a_refusal(tmp_path) -> None:
    notebook = json.dumps({"cells": [{"cell_type": "markdown", "source": "words"}]}).encode()
    originals = {
        "a.pdf": pdf([column(["some text on a page", "and more"])] * 2, title="T"),
        "a.docx": docx(paragraph("some text") * 3 + "<w:tbl><w:tr><w:tc>" + paragraph("x") + "</w:tc></w:tr></w:tbl>"),
        "a.html": b"<html><head><title>t</title></head><body><table><tr><td>x</td></tr></table><p>y</body></html>",
        "a.xml": b"<?xml version='1.0'?><a><title>t</title><b>text</b></a>",
        "a.eml": b"From: a@b.c\nSubject: s\nMIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\n\nbody",
        "a.ipynb": notebook,
        "a.csv": b'a,b\n"1",2\n',
        "a.md": b"---\ntitle: x\n---\n# H\n\n| a |\n|---|\n\n```\ncode\n```\n",
    }
    generator = random.Random(20260101)
    outcomes: dict[str, int] = {}
    for name, original in originals.items():
        for _ in range(60):
            data = bytearray(original)
            for _ in range(generator.randint(1, 8)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            outcome = outcome_of(tmp_path / name, bytes(data[: generator.randint(len(data) // 2, len(data))]))
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert set(outcomes) <= REASONS | {"read"}
    assert outcomes["read"] > 50
    assert outcomes["broken"] > 50

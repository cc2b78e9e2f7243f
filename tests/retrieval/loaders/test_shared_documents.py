"""Real documents that stand beside a development checkout: every file has an end that can be counted."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import pytest
from rapidfuzz.distance import Indel

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval import load_document
from exl2_rag.retrieval.cleaning import clean_text
from tests.support.shared_data import shared_path

pytestmark = pytest.mark.shared


def test_every_ingest_document_is_read_or_refused_by_name() -> None:
    root = shared_path("data/ingest-docs")
    outcomes: Counter[str] = Counter()
    messages: dict[str, str] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != "SOURCE.md"):
        try:
            document = load_document(path, root=root)
        except DocumentError as error:
            outcomes[error.reason] += 1
            messages[path.name] = str(error)
            continue
        outcomes["read"] += 1
        assert document.text.strip()
        assert document.title == document.title.strip() != ""
        assert "\n" not in document.title
        assert clean_text(document.text) == document.text
        assert list(document.page_starts) == sorted(document.page_starts)
        assert all(0 <= start <= len(document.text) for start in document.page_starts)
    assert all(name in message for name, message in messages.items())
    assert outcomes == {"read": 131, "no-text-layer": 6, "unsupported": 5, "encrypted": 1}


@pytest.mark.parametrize("stem", ["Kenya", "Yuan_dynasty", "Computational_complexity_theory"])
def test_an_article_reads_alike_in_five_formats(stem) -> None:
    root = shared_path("data/squad-multiformat")
    documents = {
        name: load_document(root / name / f"{stem}.{name}", root=root) for name in ("txt", "md", "html", "docx", "pdf")
    }
    texts = {
        name: " ".join(re.sub(r"^#+ ", "", unicodedata.normalize("NFKC", document.text), flags=re.MULTILINE).split())
        for name, document in documents.items()
    }
    assert {document.title for document in documents.values()} == {stem.replace("_", " ")}
    for name, text in texts.items():
        assert Indel.normalized_similarity(texts["txt"], text) > (0.995 if name == "pdf" else 0.999), name
    assert len(documents["pdf"].page_starts) > 3
    assert "CC BY-SA" not in texts["html"]

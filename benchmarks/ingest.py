"""What becomes of every file of a folder of real documents, and whether one text in five formats reads alike.

    python benchmarks/ingest.py [--documents DIR] [--formats DIR] [--list]

Each file ends as a document or as a refusal with a reason; anything else is a fault and ends the program. The articles
that stand as txt, md, html, docx and pdf are compared with their txt form: similarity of the characters after
Unicode and white space normalisation and without heading marks (1 is equal).

Prints one JSON object; `--list` adds a line for every file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Indel

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval.loaders import load_document

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
FORMATS = ("md", "html", "docx", "pdf")


def ingest(root: Path) -> list[dict[str, Any]]:
    """A row for every file: "read" with its size in characters, or the reason of its refusal."""
    rows = []
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != "SOURCE.md"):
        started = time.perf_counter()
        row: dict[str, Any] = {"file": path.relative_to(root).as_posix(), "format": path.suffix.lower().lstrip(".")}
        try:
            document = load_document(path, root=root)
            row |= {"outcome": "read", "characters": len(document.text), "title": document.title}
        except DocumentError as error:
            row |= {"outcome": error.reason, "message": str(error)}
        rows.append({**row, "ms": round(1000 * (time.perf_counter() - started), 1)})
    return rows


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Outcomes counted by format."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["format"], Counter())[row["outcome"]] += 1
    return {name: dict(sorted(counts[name].items())) for name in sorted(counts)}


def compare_formats(root: Path) -> dict[str, dict[str, float]]:
    """Similarity to the txt form for each format: the lowest and the mean over all articles."""
    similarities: dict[str, list[float]] = {name: [] for name in FORMATS}
    for article in json.loads((root / "manifest.json").read_text(encoding="utf-8")):
        texts = {
            name: _normalised(load_document(root / name / f"{article['file_stem']}.{name}", root=root).text)
            for name in ("txt", *FORMATS)
        }
        for name in FORMATS:
            similarities[name].append(Indel.normalized_similarity(texts["txt"], texts[name]))
    return {
        name: {"lowest": round(min(values), 5), "mean": round(sum(values) / len(values), 5)}
        for name, values in similarities.items()
    }


def _normalised(text: str) -> str:
    return " ".join(re.sub(r"^#+ ", "", unicodedata.normalize("NFKC", text), flags=re.MULTILINE).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, default=DATA / "ingest-docs")
    parser.add_argument("--formats", type=Path, default=DATA / "squad-multiformat")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    for folder in (arguments.documents, arguments.formats):
        if not folder.is_dir():
            sys.exit(f"there is no folder {folder}; give one with --documents and --formats")
    rows = ingest(arguments.documents)
    result = {
        "files": len(rows),
        "outcomes": dict(sorted(Counter(row["outcome"] for row in rows).items())),
        "by_format": table(rows),
        "slowest_ms": max(row["ms"] for row in rows),
        "similarity_to_txt": compare_formats(arguments.formats),
    }
    print(json.dumps(result | ({"list": rows} if arguments.list else {}), ensure_ascii=False))


if __name__ == "__main__":
    main()

"""`index` and `ask`: a folder, a random model, and quotes that are real all the same."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

PAGES = "The page table shares pages between requests. A page holds 32 tokens by default. Pinned pages stay."
QUOTES = "A quote is verified against the document. The model may decline to answer. Every citation has offsets."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "pages.md").write_text(f"# Pages\n\n{PAGES}\n", encoding="utf-8")
    (documents / "quotes.txt").write_text(QUOTES, encoding="utf-8")
    (documents / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    return documents


def test_a_folder_is_indexed_and_what_cannot_be_read_is_named(run: Run, folder: Path) -> None:
    result = run("index", folder, "--settings", "cpu-small")
    assert result.exit_code == 0, result.output
    assert "2 indexed, 0 unchanged, 0 removed" in result.stdout
    assert "broken.pdf" in result.stdout


def test_a_second_run_reads_only_what_changed(run: Run, folder: Path) -> None:
    run("index", folder, "--settings", "cpu-small")
    (folder / "quotes.txt").unlink()
    (folder / "new.txt").write_text("A new file about the scheduler.", encoding="utf-8")
    report = json.loads(run("index", folder, "--settings", "cpu-small", "--json").stdout)
    assert (report["indexed"], report["unchanged"], report["removed"]) == (["new.txt"], ["pages.md"], ["quotes.txt"])


def test_an_answer_quotes_the_documents_at_the_offsets_given(run: Run, folder: Path, model_dir: Path) -> None:
    run("index", folder, "--settings", "cpu-small")
    result = run("ask", "How many tokens does a page hold?", "--model", model_dir, "--chunks", 1, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["question"] == "How many tokens does a page hold?"
    for claim in answer["claims"]:
        citation = claim["citation"]
        assert citation["source"] == "pages.md"
        assert citation["quote"] in PAGES
        assert citation["end"] - citation["start"] == len(citation["quote"])


def test_an_answer_on_a_terminal_says_what_it_cost(run: Run, folder: Path, model_dir: Path) -> None:
    run("index", folder, "--settings", "cpu-small")
    result = run("ask", "How many tokens does a page hold?", "--model", model_dir, "--chunks", 1)
    assert result.exit_code == 0, result.output
    assert "prompt tokens from the cache" in result.stdout


def test_asking_without_an_index_says_how_to_make_one(run: Run, model_dir: Path) -> None:
    result = run("ask", "Anything?", "--model", model_dir)
    assert result.exit_code == 1
    assert "exl2-rag index" in result.stderr


def test_an_empty_folder_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("index", tmp_path / "empty", "--settings", "cpu-small")
    assert result.exit_code == 1
    assert "empty" in result.stderr

"""`demo`: the whole path with the demo model, on the documents that come with it."""

import json

from exl2_rag.demo import documents_dir
from exl2_rag.retrieval import load_document
from tests.cli.conftest import Run

MIN_PAGES, WORDS_PER_PAGE = 20, 400


def test_four_questions_are_answered_through_both_frameworks_with_real_quotes(run: Run) -> None:
    result = run("demo", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [one["framework"] for one in report["asked"]] == ["LangChain"] * 3 + ["LlamaIndex"]
    assert len(report["index"]["indexed"]) == 5
    texts = [load_document(path, root=documents_dir()).text for path in sorted(documents_dir().iterdir())]
    quotes = [quote["quote"] for one in report["asked"] for quote in one["quotes"]]
    assert quotes
    for quote in quotes:
        assert any(quote in text for text in texts)
    for one in report["asked"]:
        assert one["cached_warm"] >= one["prompt_tokens"] - 1


def test_a_second_run_finds_its_index_up_to_date(run: Run) -> None:
    run("demo", "--json")
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert "0 indexed, 5 unchanged" in result.stdout
    assert "Cold against warm" in result.stdout


def test_the_demo_documents_are_five_formats_and_twenty_pages() -> None:
    paths = sorted(documents_dir().iterdir())
    assert {path.suffix for path in paths} == {".md", ".html", ".pdf", ".docx", ".txt"}
    words = sum(len(load_document(path, root=documents_dir()).text.split()) for path in paths)
    assert words >= MIN_PAGES * WORDS_PER_PAGE

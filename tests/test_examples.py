"""Every example runs. Those of the frameworks are tested with their adapters."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_" + Path(path).stem, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generate_repeats_its_greedy_text_from_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    load("generate.py").main([])
    printed = capsys.readouterr().out
    assert "the same text: True" in printed
    assert printed.count("batch:") == 3


def test_stream_json_obeys_its_schema(capsys: pytest.CaptureFixture[str]) -> None:
    value = load("stream_json.py").main([])
    assert set(value) == {"city", "population", "continent", "capital"}
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == value


def test_the_document_app_answers_with_quotes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = load("document_qa/app.py").main(
        ["--index", str(tmp_path / "index"), "--question", "Which files does the loader refuse?"]
    )
    assert len(answers) == 1
    printed = capsys.readouterr().out
    assert "5 files read" in printed
    for claim in answers[0].claims:
        assert claim.citation.quote in printed

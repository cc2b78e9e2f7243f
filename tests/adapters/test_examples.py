"""The framework examples run as they stand, with a tiny EXL2 model: the form is tested, not the sense."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exl2_rag.retrieval.index import DocumentIndex
from tests.support.synthetic import make_model_dir

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    return make_model_dir(directory, quantised=True, layers=1, max_position=8192)


@pytest.fixture(scope="module")
def index_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the first example, found unchanged by the second."""
    return tmp_path_factory.mktemp("demo") / "index"


def check_quotes(index_dir: Path, citations: list[dict[str, Any]]) -> None:
    with DocumentIndex.open(index_dir) as index:
        for citation in citations:
            text = index.document_text(citation["source"])
            assert text[citation["start"] :].startswith(citation["quote"])


def check_counts(shown: str) -> None:
    """The third question is the second one again: its prompt must come from the cache."""
    counts = [line.split() for line in shown.splitlines() if "from the cache" in line]
    cold, warm = counts[1], counts[2]
    assert int(cold[3]) < int(cold[0])
    assert int(warm[3]) >= int(warm[0]) - 1


def test_the_langchain_chain_quotes_the_documents(
    model: Path, index_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = load("langchain_chain").main([str(model), "--index", str(index_dir)])
    assert len(answers) == 3
    check_quotes(index_dir, [claim for claims in answers for claim in claims])
    check_counts(capsys.readouterr().out)


def test_the_llama_index_engine_cites_the_documents(
    model: Path, index_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    responses = load("llama_index_engine").main([str(model), "--index", str(index_dir)])
    assert len(responses) == 3
    check_quotes(index_dir, [citation for response in responses for citation in response.metadata["citations"]])
    check_counts(capsys.readouterr().out)

"""A scripted engine, and a real one over a tiny EXL2 model with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from exl2_rag import ExL2LLM
from exl2_rag.retrieval.index import DocumentIndex
from tests.adapters.document_index import make_index
from tests.adapters.fake_engine import FakeEngine
from tests.support.synthetic import make_model_dir


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny-exl2", quantised=True, max_position=1024)


@pytest.fixture(scope="session")
def llm(model_dir: Path) -> Iterator[ExL2LLM]:
    with ExL2LLM(model_dir, num_threads=1) as llm:
        yield llm


@pytest.fixture(scope="session")
def document_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DocumentIndex]:
    with make_index(tmp_path_factory.mktemp("indexes") / "index") as index:
        yield index

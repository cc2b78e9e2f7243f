"""LangChain embeddings over the offline embedder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from pydantic import ValidationError

from exl2_rag.adapters.langchain import ExL2Embeddings
from exl2_rag.errors import ModelNotFoundError, TextTooLongError
from exl2_rag.retrieval.embedding import default_embedder


class TestExL2EmbeddingsUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return ExL2Embeddings


class TestExL2EmbeddingsIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return ExL2Embeddings


async def test_vectors_are_the_embedders() -> None:
    embeddings, texts = ExL2Embeddings(), ["A page holds tokens.", "Cats sleep."]
    expected = default_embedder().embed(texts)
    assert np.allclose(embeddings.embed_documents(texts), expected, atol=1e-6)
    assert np.allclose(await embeddings.aembed_query(texts[1]), expected[1], atol=1e-6)
    assert embeddings.embed_documents([]) == []


def test_embeddings_share_one_loaded_model() -> None:
    assert ExL2Embeddings()._embedder is ExL2Embeddings()._embedder


def test_an_over_long_text_is_an_error() -> None:
    with pytest.raises(TextTooLongError):
        ExL2Embeddings().embed_query("word " * 500)


def test_mistakes_show_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nothing-here"):
        ExL2Embeddings(model_dir=tmp_path / "nothing-here")
    with pytest.raises(ValidationError, match="got both"):
        ExL2Embeddings(embedder=default_embedder(), model_dir=tmp_path)
    with pytest.raises(ValidationError, match="embedder must be"):
        ExL2Embeddings(embedder="all-MiniLM")
    with pytest.raises(ValidationError, match="modeldir"):
        ExL2Embeddings(modeldir=tmp_path)  # type: ignore[call-arg]

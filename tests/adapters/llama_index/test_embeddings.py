"""The LlamaIndex embedding model over the offline embedder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from exl2_rag.adapters.llama_index import ExL2Embedding
from exl2_rag.errors import ModelNotFoundError, TextTooLongError
from exl2_rag.retrieval.embedding import default_embedder

TEXTS = ["A page holds tokens.", "Cats sleep.", "Dogs bark."]


async def test_vectors_are_the_embedders_on_every_way() -> None:
    model, expected = ExL2Embedding(embed_batch_size=2), default_embedder().embed(TEXTS)
    assert np.allclose(model.get_text_embedding_batch(TEXTS), expected, atol=1e-6)
    assert np.allclose(await model.aget_text_embedding_batch(TEXTS), expected, atol=1e-6)
    assert np.allclose(model.get_text_embedding(TEXTS[0]), expected[0], atol=1e-6)
    assert np.allclose(await model.aget_text_embedding(TEXTS[0]), expected[0], atol=1e-6)
    assert np.allclose(model.get_query_embedding(TEXTS[1]), expected[1], atol=1e-6)
    assert np.allclose(await model.aget_query_embedding(TEXTS[1]), expected[1], atol=1e-6)


def test_the_model_is_named_and_the_embedder_kept_out_of_serialisation() -> None:
    model = ExL2Embedding()
    assert "minilm" in model.model_name.lower()
    assert "embedder" not in model.to_dict()


def test_an_over_long_text_is_an_error() -> None:
    with pytest.raises(TextTooLongError):
        ExL2Embedding().get_text_embedding("word " * 500)


def test_mistakes_show_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nothing-here"):
        ExL2Embedding(model_dir=tmp_path / "nothing-here")
    with pytest.raises(ValidationError, match="modeldir"):
        ExL2Embedding(modeldir=tmp_path)

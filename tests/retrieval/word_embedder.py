"""A small real embedder for tests: words hashed into buckets. Same words, same direction; no model, no download."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from exl2_rag.errors import TextTooLongError
from exl2_rag.retrieval.embedding import Vectors


class WordEmbedder:
    """Vectors of word counts. `embedded` remembers every text it was asked for."""

    def __init__(self, *, dimension: int = 64, max_tokens: int = 60, name: str = "words") -> None:
        self.id = f"{name}@{dimension}"
        self.dimension = dimension
        self.max_tokens = max_tokens
        self.embedded: list[str] = []

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(_words(text)) for text in texts]

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            words = _words(text)
            if len(words) > self.max_tokens:
                raise TextTooLongError(f"{len(words)} words, expected at most {self.max_tokens}")
            for word in words:
                vectors[row, zlib.crc32(word.lower().encode()) % self.dimension] += 1
            self.embedded.append(text)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(norms == 0, 1, norms)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)

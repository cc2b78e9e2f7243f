"""`ExL2Embedding`: this package's embedder as a LlamaIndex embedding model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import ConfigDict, Field, PrivateAttr

from exl2_rag.adapters.embedders import find_embedder
from exl2_rag.retrieval.embedding import Embedder


class ExL2Embedding(BaseEmbedding):
    """A LlamaIndex embedding model that runs offline: unit vectors, by default of all-MiniLM-L6-v2 (384 dimensions).

    A text longer than the embedder reads raises TextTooLongError: nothing is cut silently. The async methods run in a
    thread.

    Attributes:
        embedder: an `Embedder`; or
        model_dir: a sentence-transformers directory; or neither for the default one.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    embedder: Any = Field(default=None, exclude=True, repr=False)
    model_dir: str | Path | None = None

    _embedder: Embedder = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Find the embedder, so that a wrong path shows at once."""
        super().model_post_init(context)
        self._embedder = find_embedder(self.embedder, self.model_dir)
        self.model_name = self._embedder.id.partition("@")[0]

    @classmethod
    def class_name(cls) -> str:
        """Name LlamaIndex stores objects under."""
        return "ExL2Embedding"

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [[float(number) for number in vector] for vector in self._embedder.embed(texts)]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embeddings([query])[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

"""`ExL2Embeddings`: this package's embedder as LangChain embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from exl2_rag.adapters.embedders import find_embedder
from exl2_rag.retrieval.embedding import Embedder


class ExL2Embeddings(BaseModel, Embeddings):
    """LangChain embeddings that run offline: unit vectors, by default of all-MiniLM-L6-v2 with 384 dimensions.

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

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text."""
        return [[float(number) for number in vector] for vector in self._embedder.embed(texts)]

    def embed_query(self, text: str) -> list[float]:
        """A vector for one text; the same as `embed_documents` gives."""
        return self.embed_documents([text])[0]

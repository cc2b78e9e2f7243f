"""`ExL2Retriever`: this package's hybrid retrieval as a LangChain retriever."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field, PrivateAttr

from exl2_rag.adapters.chunks import chunk_metadata, find_retriever


class ExL2Retriever(BaseRetriever):
    """The best chunks of an index for a question, best first.

    The metadata of a document holds `source`, `title`, `heading`, `page`, `start`, `end`, `label` and `score`.

    Attributes:
        index: an open `DocumentIndex`, or a `Retriever` over one with settings of its own. It stays the caller's.
        k: how many chunks; a call may override it: `retriever.invoke(question, k=3)`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    index: Any = Field(exclude=True, repr=False)
    k: int = Field(default=5, ge=1)

    _retriever: Any = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Check the index, so that a mistake shows at once."""
        super().model_post_init(context)
        self._retriever = find_retriever(self.index)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = self._retriever.retrieve(query, k=self.k if k is None else k)
        return [Document(id=f.chunk.chunk_id, page_content=f.chunk.text, metadata=chunk_metadata(f)) for f in found]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return await run_in_executor(None, self._get_relevant_documents, query, run_manager=run_manager.get_sync(), k=k)

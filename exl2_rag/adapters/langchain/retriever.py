"""`ExL2Retriever`: this package's hybrid retrieval as a LangChain retriever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, PrivateAttr

from exl2_rag.adapters.chunks import chunk_metadata, find_index


class ExL2Retriever(BaseRetriever):
    """The best chunks of an index for a question, best first.

    The metadata of a document holds `source`, `title`, `heading`, `page`, `start`, `end`, `label` and `score`.

    Attributes:
        index: a `DocumentIndex`; or
        index_dir: the directory of one.
        k: how many chunks; a call may override it: `retriever.invoke(question, k=3)`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    index: Any = Field(default=None, exclude=True, repr=False)
    index_dir: str | Path | None = None
    k: int = Field(default=5, ge=1)

    _retriever: Any = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Open the index, so that a wrong path shows at once."""
        from exl2_rag.retrieval import Retriever

        super().model_post_init(context)
        self._retriever = Retriever(find_index(self.index, self.index_dir))

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = self._retriever.retrieve(query, k=self.k if k is None else k)
        return [Document(id=f.chunk.chunk_id, page_content=f.chunk.text, metadata=chunk_metadata(f)) for f in found]

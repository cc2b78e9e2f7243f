"""`ExL2Retriever`: this package's hybrid retrieval as a LlamaIndex retriever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from exl2_rag.adapters.chunks import chunk_metadata, find_retriever
from exl2_rag.errors import SettingsError

if TYPE_CHECKING:
    from exl2_rag.retrieval.document import ScoredChunk
    from exl2_rag.retrieval.index import DocumentIndex
    from exl2_rag.retrieval.retriever import Retriever

# LlamaIndex puts metadata in front of a node's text in every prompt. Only the title stays the same from question to
# question and means something to a model; a score there would spoil prefix reuse.
IN_PROMPT = {"title"}


class ExL2Retriever(BaseRetriever):
    """The best chunks of an index for a question, best first.

    The metadata of a node holds `source`, `title`, `heading`, `page`, `start`, `end`, `label` and `score`.

    Args:
        index: an open `DocumentIndex`, or a `Retriever` over one with settings of its own. It stays the caller's.
        k: how many chunks.

    Raises:
        SettingsError: `index` is neither, or k is below 1.
    """

    def __init__(self, index: DocumentIndex | Retriever, *, k: int = 5) -> None:
        if k < 1:
            raise SettingsError(f"k must be at least 1, got {k}")
        self.k = k
        self._retriever = find_retriever(index)
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [_to_node(found) for found in self._retriever.retrieve(query_bundle.query_str, k=self.k)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _to_node(found: ScoredChunk) -> NodeWithScore:
    chunk, metadata = found.chunk, chunk_metadata(found)
    hidden = [key for key in metadata if key not in IN_PROMPT]
    node = TextNode(
        id_=chunk.chunk_id,
        text=chunk.text,
        start_char_idx=chunk.start,
        end_char_idx=chunk.end,
        metadata=metadata,
        excluded_llm_metadata_keys=hidden,
        excluded_embed_metadata_keys=hidden,
    )
    return NodeWithScore(node=node, score=found.score)

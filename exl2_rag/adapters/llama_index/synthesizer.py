"""`ExL2CitationSynthesizer`: answers with verified quotes in a LlamaIndex query engine.

LlamaIndex's own citation engine numbers its sources anew for every question and cuts the chunks again, so that no two
prompts share a prefix. This one hands the retrieved nodes to `DocumentQA`: stable labels, canonical order, question
last, quotes held to the documents while decoding and verified after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama_index.core.base.response.schema import Response
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher

from exl2_rag.adapters.llama_index.model import ExL2
from exl2_rag.adapters.shared import usage_counts
from exl2_rag.errors import SettingsError
from exl2_rag.qa.pipeline import DocumentQA
from exl2_rag.retrieval.document import Chunk, ScoredChunk

if TYPE_CHECKING:
    from llama_index.core.prompts.mixin import PromptDictType

    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.qa.answer import Answer
    from exl2_rag.qa.settings import QASettings
    from exl2_rag.retrieval.index import DocumentIndex

DECLINED_TEXT = "The documents do not hold an answer."

dispatcher = get_dispatcher(__name__)


class ExL2CitationSynthesizer(BaseSynthesizer):
    """Answers from the nodes of an `ExL2Retriever`, with citations.

    `response.response` is the answer, or `DECLINED_TEXT`. `response.metadata` holds `answerable`; `citations`, each
    with `quote`, `source`, `page`, `start`, `end` and how it `match`ed; and the token counts as `usage`.

    Args:
        llm: the engine, or the adapter over it.
        index: the index the retriever searches; its secret delimiter marks the documents in the prompt.
        settings: None: what the model's card says, else the defaults.
    """

    def __init__(self, llm: ExL2LLM | ExL2, index: DocumentIndex, settings: QASettings | None = None) -> None:
        model = llm if isinstance(llm, ExL2) else ExL2(llm=llm)
        self._index = index
        self._answers = DocumentQA(model.engine, index, settings)
        super().__init__(llm=model)

    def synthesize(
        self,
        query: str | QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> Response:
        """Answer a query from the nodes."""
        text, answers = self._begin(query, nodes, response_kwargs)
        with self._callback_manager.event(CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: text}) as event:
            response = _to_response(answers.ask(text), [*nodes, *(additional_source_nodes or ())])
            event.on_end(payload={EventPayload.RESPONSE: response})
        dispatcher.event(SynthesizeEndEvent(query=query, response=response))
        return response

    async def asynthesize(
        self,
        query: str | QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> Response:
        """Answer a query from the nodes."""
        text, answers = self._begin(query, nodes, response_kwargs)
        with self._callback_manager.event(CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: text}) as event:
            response = _to_response(await answers.aask(text), [*nodes, *(additional_source_nodes or ())])
            event.on_end(payload={EventPayload.RESPONSE: response})
        dispatcher.event(SynthesizeEndEvent(query=query, response=response))
        return response

    def _begin(
        self, query: str | QueryBundle, nodes: Sequence[NodeWithScore], options: dict[str, Any]
    ) -> tuple[str, DocumentQA]:
        if options:
            raise SettingsError(f"unknown option {next(iter(options))!r}; this synthesizer takes a query and its nodes")
        dispatcher.event(SynthesizeStartEvent(query=query))
        given = _GivenChunks(self._index, [_to_chunk(node) for node in nodes])
        text = query if isinstance(query, str) else query.query_str
        return text, DocumentQA(self._answers.llm, given, self._answers.settings)  # type: ignore[arg-type]

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> str:
        """Not possible: a bare text has no source that could be cited.

        Raises:
            SettingsError: always.
        """
        raise SettingsError("a citation needs nodes, not bare texts; call synthesize(query, nodes)")

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> str:
        """Not possible: a bare text has no source that could be cited.

        Raises:
            SettingsError: always.
        """
        raise SettingsError("a citation needs nodes, not bare texts; call asynthesize(query, nodes)")

    def _get_prompts(self) -> PromptDictType:
        return {}  # the prompt form is fixed: models are trained for it

    def _update_prompts(self, prompts: PromptDictType) -> None:
        if prompts:
            raise SettingsError("the prompt form of this synthesizer is fixed, since models are trained for it")


class _GivenChunks:
    """Stands in for a retriever where LlamaIndex has retrieved already."""

    def __init__(self, index: DocumentIndex, chunks: list[ScoredChunk]) -> None:
        self.index = index
        self._chunks = chunks

    def retrieve(self, question: str, k: int) -> list[ScoredChunk]:
        """All chunks, whatever `k` says: how many there are was decided by the LlamaIndex retriever."""
        return self._chunks


def _to_chunk(found: NodeWithScore) -> ScoredChunk:
    fields = ("label", "source", "title", "heading", "start", "end", "page")
    metadata = found.node.metadata
    if missing := [name for name in fields if name not in metadata]:
        raise SettingsError(
            f"node {found.node.node_id} has no {missing[0]!r} in its metadata; expected nodes from an ExL2Retriever"
        )
    text = found.node.get_content()
    chunk = Chunk(chunk_id=found.node.node_id, text=text, **{name: metadata[name] for name in fields})
    return ScoredChunk(chunk, found.score or 0.0)


def _to_response(answer: Answer, nodes: list[NodeWithScore]) -> Response:
    citations = [{"text": claim.text, **asdict(claim.citation)} for claim in answer.claims]
    metadata = {"answerable": answer.answerable, "citations": citations, "usage": usage_counts(answer.usage)}
    return Response(answer.text or DECLINED_TEXT, source_nodes=nodes, metadata=metadata)

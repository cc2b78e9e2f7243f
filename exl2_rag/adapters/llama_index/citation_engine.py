"""`citation_engine`: a LlamaIndex query engine that answers with verified quotes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_index.core.query_engine import RetrieverQueryEngine

from exl2_rag.adapters.llama_index.model import ExL2
from exl2_rag.adapters.llama_index.retriever import ExL2Retriever
from exl2_rag.adapters.llama_index.synthesizer import ExL2CitationSynthesizer
from exl2_rag.qa.settings import QASettings

if TYPE_CHECKING:
    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.retrieval import DocumentIndex


def citation_engine(
    llm: ExL2LLM | ExL2, index: DocumentIndex, settings: QASettings | None = None
) -> RetrieverQueryEngine:
    """Retriever and citation synthesizer of this package in LlamaIndex's own query engine.

    Args:
        llm: the engine, or the LlamaIndex model over it.
        index: what is searched.
        settings: None: what the model's card says, else the defaults of `QASettings`.
    """
    engine = llm.engine if isinstance(llm, ExL2) else llm
    settings = QASettings.for_model(engine.model_dir) if settings is None else settings
    return RetrieverQueryEngine(
        retriever=ExL2Retriever(index, k=settings.k),
        response_synthesizer=ExL2CitationSynthesizer(engine, index, settings),
    )

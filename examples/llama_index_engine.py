"""Ask the demo documents through a LlamaIndex query engine, with citations.

    python examples/llama_index_engine.py [MODEL_DIR]

Retriever and synthesizer are this package's; everything LlamaIndex builds from them works as usual.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llama_index.core.base.response.schema import Response
from llama_index.core.query_engine import RetrieverQueryEngine

from exl2_rag import ExL2LLM
from exl2_rag.adapters.llama_index import ExL2CitationSynthesizer, ExL2Retriever
from exl2_rag.demo import model_dir
from exl2_rag.qa.settings import QASettings
from exl2_rag.retrieval import DocumentIndex

DOCUMENTS = Path(__file__).parent / "document_qa" / "documents"
QUESTIONS = (
    "In which order are the pages of a chain evicted?",
    "What happens when a stream is closed?",
    "What happens when a stream is closed?",  # again: now its prompt is in the cache
)


def build_query_engine(llm: ExL2LLM, index: DocumentIndex) -> RetrieverQueryEngine:
    """A query engine that answers with verified quotes."""
    settings = QASettings.for_model(llm.model_dir)
    return RetrieverQueryEngine(
        retriever=ExL2Retriever(index, k=settings.k),
        response_synthesizer=ExL2CitationSynthesizer(llm, index, settings),
    )


def main(arguments: Sequence[str] | None = None) -> list[Response]:
    """Run the example; returns the responses."""
    arguments = sys.argv[1:] if arguments is None else arguments
    responses = []
    with (
        tempfile.TemporaryDirectory() as directory,
        ExL2LLM(arguments[0] if arguments else model_dir()) as llm,
        DocumentIndex.create_or_open(Path(directory) / "index") as index,
    ):
        report = index.update(DOCUMENTS)
        print(f"indexed {len(report.indexed)} documents, {report.n_chunks} chunks")
        engine = build_query_engine(llm, index)
        for question in QUESTIONS:
            response = engine.query(question)
            usage = response.metadata["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            print(f"\n{question}\n  {usage['prompt_tokens']} prompt tokens, {cached} of them from the cache")
            print(f"  {response.response}")
            for citation in response.metadata["citations"]:
                place = f"{citation['source']}, character {citation['start']}"
                print(f"    “{citation['quote']}” ({place})")
            responses.append(response)
    return responses


if __name__ == "__main__":
    main()

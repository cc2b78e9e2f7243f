"""Ask the demo documents through a LlamaIndex query engine, with citations.

    python examples/llama_index_engine.py [MODEL_DIR] [--index DIR]

Retriever and synthesizer are this package's; everything LlamaIndex builds from them works as usual.
"""

from __future__ import annotations

import argparse
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
    parser = argparse.ArgumentParser(description="Ask the demo documents.")
    parser.add_argument("model", nargs="?", type=Path, default=None, help="model directory; left out: the demo model")
    parser.add_argument("--index", type=Path, default=Path(".exl2-rag/examples"), help="where the index is kept")
    options = parser.parse_args(arguments)
    responses = []
    with ExL2LLM(options.model or model_dir()) as llm, DocumentIndex.create_or_open(options.index) as index:
        report = index.update(DOCUMENTS)
        print(f"{report.n_chunks} chunks; read {len(report.indexed)} documents, {len(report.unchanged)} were unchanged")
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

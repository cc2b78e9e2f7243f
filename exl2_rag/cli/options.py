"""Settings files turned into what the parts take. The parts know no settings files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exl2_rag.qa.settings import QASettings
    from exl2_rag.retrieval import DocumentIndex, Retriever
    from exl2_rag.settings import Settings


def make_index(path: Path, settings: Settings) -> DocumentIndex:
    """Open or make an index as the `[retrieval]` section says."""
    from exl2_rag.retrieval import DocumentIndex

    retrieval = settings.retrieval
    return DocumentIndex.create_or_open(path, store=retrieval.store, chunk_tokens=retrieval.chunk_tokens)


def make_retriever(index: DocumentIndex, settings: Settings) -> Retriever:
    """A retriever as the `[retrieval]` section says."""
    from exl2_rag.retrieval import Retriever

    retrieval = settings.retrieval
    return Retriever(
        index, fusion=retrieval.fusion, dense_weight=retrieval.dense_weight, candidates=retrieval.candidates
    )


def answer_settings(settings: Settings, model_dir: Path, chunks: int | None) -> QASettings:
    """The command line before the `[answers]` section before the model's card before the defaults."""
    from exl2_rag.qa.settings import QASettings

    answers = settings.answers
    return QASettings.for_model(
        model_dir,
        k=answers.chunks if chunks is None else chunks,
        quote_unit=answers.quote_unit,
        max_claims=answers.max_claims,
        claim_text=answers.claim_text,
        max_tokens=answers.max_tokens,
        order=answers.order,
    )

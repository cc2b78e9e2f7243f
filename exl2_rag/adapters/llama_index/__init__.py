"""LlamaIndex objects over this engine and its retrieval: model, embeddings, retriever."""

from exl2_rag.adapters.llama_index.citation_engine import citation_engine
from exl2_rag.adapters.llama_index.embeddings import ExL2Embedding
from exl2_rag.adapters.llama_index.model import ExL2
from exl2_rag.adapters.llama_index.retriever import ExL2Retriever
from exl2_rag.adapters.llama_index.synthesizer import DECLINED_TEXT, ExL2CitationSynthesizer

__all__ = ["DECLINED_TEXT", "ExL2", "ExL2CitationSynthesizer", "ExL2Embedding", "ExL2Retriever", "citation_engine"]

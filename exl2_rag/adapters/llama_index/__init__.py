"""LlamaIndex objects over this engine and its retrieval: model, embeddings, retriever."""

from exl2_rag.adapters.llama_index.model import ExL2
from exl2_rag.adapters.llama_index.retriever import ExL2Retriever

__all__ = ["ExL2", "ExL2Retriever"]

"""LangChain objects over this engine and its retrieval: chat model, completion model, embeddings, retriever."""

from exl2_rag.adapters.langchain.chat_model import ChatExL2
from exl2_rag.adapters.langchain.citation_chain import citation_chain
from exl2_rag.adapters.langchain.completion_model import ExL2
from exl2_rag.adapters.langchain.embeddings import ExL2Embeddings
from exl2_rag.adapters.langchain.errors import PromptTooLongError
from exl2_rag.adapters.langchain.retriever import ExL2Retriever

__all__ = ["ChatExL2", "ExL2", "ExL2Embeddings", "ExL2Retriever", "PromptTooLongError", "citation_chain"]

"""Files in, documents out. One module a family of formats; `load_document` is the door."""

from __future__ import annotations

from exl2_rag.retrieval.loaders.extracted import LoadLimits
from exl2_rag.retrieval.loaders.load import LOADING_VERSION, load_document

__all__ = ["LOADING_VERSION", "LoadLimits", "load_document"]

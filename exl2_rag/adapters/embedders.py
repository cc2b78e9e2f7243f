"""Finding the embedder behind an adapter. Knows no framework."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from exl2_rag.errors import SettingsError
from exl2_rag.retrieval.embedding import Embedder, SentenceTransformerEmbedder, default_embedder

# Loaded ones by directory; None is the default one.
_embedders: dict[Path | None, Embedder] = {}
_embedders_lock = threading.Lock()


def find_embedder(embedder: Any, model_dir: str | Path | None) -> Embedder:
    """The embedder given, the one of a sentence-transformers directory, or the default one. Directories are shared.

    Raises:
        SettingsError: both are given, or `embedder` is not one.
        ModelNotFoundError: the directory holds no model, or the package of the default one is not installed.
    """
    if embedder is not None and model_dir is not None:
        raise SettingsError("expected embedder=<Embedder> or model_dir=<directory> or neither, got both")
    if embedder is None:
        path = None if model_dir is None else Path(model_dir).expanduser().resolve()
        with _embedders_lock:
            if path not in _embedders:
                _embedders[path] = default_embedder() if path is None else SentenceTransformerEmbedder(path)
            return _embedders[path]
    if not isinstance(embedder, Embedder):
        raise SettingsError(
            f"embedder must be an Embedder, got {type(embedder).__name__}; "
            "to name a sentence-transformers directory write model_dir=…"
        )
    return embedder

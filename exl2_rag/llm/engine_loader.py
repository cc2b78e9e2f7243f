"""From a model directory to an engine that is ready to run."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exl2_rag.errors import ModelError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.decode_tapes import DecodeTapes
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.engine_config import EngineConfig, EngineOptions, ModelShape, available_memory_bytes, resolve
from exl2_rag.llm.fingerprint import cache_fingerprint
from exl2_rag.llm.kernels.ops import native_available, set_num_threads
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.model_runner import ModelRunner
from exl2_rag.llm.models.registry import load_model
from exl2_rag.llm.models.tensor_names import FINAL_NORM_KEY
from exl2_rag.llm.output_text import TokenDecoder
from exl2_rag.llm.request import GenerationRequest
from exl2_rag.llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from exl2_rag.llm.constraint import ConstraintMatcher

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An engine and what it was made of."""

    engine: Engine
    tokenizer: Tokenizer
    config: ModelConfig


class TokenizerText:
    """A tokenizer as the engine wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def decoder(self, prompt: tuple[int, ...]) -> TokenDecoder:
        """A fresh decoder for what follows the prompt."""
        return self._tokenizer.incremental(after=prompt)

    def matcher(self, request: GenerationRequest) -> ConstraintMatcher | None:
        """A fresh matcher of the request's constraint. Raises ConstraintError if it cannot be enforced."""
        if request.constraint is None:
            return None
        return request.constraint.compile(self._tokenizer, self._vocab_size)


def load_engine(model_dir: Path, options: EngineOptions) -> LoadedModel:
    """Read a model and make its engine.

    Raises:
        ModelError: there is no usable model; the message names the directory.
        SettingsError: an option out of range, or one that this version does not have.
    """
    try:
        return _load(model_dir, options)
    except ModelError as error:
        if str(model_dir) in str(error):
            raise
        raise type(error)(f"{model_dir}: {error}") from error


def _load(model_dir: Path, options: EngineOptions) -> LoadedModel:
    config = ModelConfig.from_dir(model_dir)
    checkpoint = Checkpoint.open(model_dir)
    engine_config = _engine_config(config, checkpoint, options)
    tokenizer = Tokenizer.from_dir(model_dir)
    if options.num_threads is not None:
        set_num_threads(options.num_threads)
    device = torch.device(engine_config.device)
    model = load_model(
        model_dir,
        config,
        checkpoint,
        device=device,
        max_seq_len=engine_config.max_seq_len,
        precision=engine_config.precision,
    )
    cache = KVCache(
        n_layers=config.n_layers,
        n_pages=engine_config.n_pages,
        page_size=engine_config.page_size,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        dtype=TORCH_DTYPES[engine_config.cache_dtype],
        device=device,
    )
    _give_back_freed_memory()
    table_width = -(-engine_config.max_seq_len // engine_config.page_size)
    engine = Engine(
        ModelRunner(model, cache, device, decode_tapes=DecodeTapes(model, cache, table_width)),
        engine_config,
        TokenizerText(tokenizer, config.vocab_size),
        vocab_size=config.vocab_size,
        eos_token_ids={*config.eos_token_ids, *tokenizer.eos_token_ids},
        fingerprint=cache_fingerprint(
            model_dir,
            cache_dtype=engine_config.cache_dtype,
            page_size=engine_config.page_size,
            precision=engine_config.precision,
        ),
    )
    return LoadedModel(engine, tokenizer, config)


def _give_back_freed_memory() -> None:
    """Let the C library return what loading has freed: the tensors of the files, each as large as a matrix."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others need no asking
        if trim is not None:
            trim(0)


def _engine_config(config: ModelConfig, checkpoint: Checkpoint, options: EngineOptions) -> EngineConfig:
    norm = f"{FINAL_NORM_KEY}.weight"  # a plain tensor in every model; one that lacks it is refused when it is loaded
    shape = ModelShape(
        max_seq_len=config.max_seq_len,
        cache_elements_per_token=2 * config.n_layers * config.n_kv_heads * config.head_dim,
        fp32_weights=checkpoint.has(norm) and checkpoint.tensor(norm).dtype == torch.float32,
    )
    return resolve(
        options,
        shape,
        native=native_available(),
        free_bytes=max(0, available_memory_bytes() - checkpoint.total_bytes()),
    )

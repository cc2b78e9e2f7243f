"""From a model directory to an engine that is ready to run."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exl2_rag.errors import DeviceMemoryError, ModelError, SettingsError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.cuda_graphs import DecodeGraphs
from exl2_rag.llm.decode_tapes import DecodeTapes
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.engine_config import (
    PROMPT_LOOKUP,
    QUANTISED_CACHE_BITS,
    EngineConfig,
    EngineOptions,
    ModelShape,
    available_memory_bytes,
    resolve,
)
from exl2_rag.llm.fingerprint import CacheIdentity
from exl2_rag.llm.kernels import cuda_runtime
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.kernels.ops import native_available, set_num_threads
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.kv_store.open_tiers import TierOptions, open_tiers
from exl2_rag.llm.lora.shelf import LoraShelf
from exl2_rag.llm.model_runner import ModelRunner
from exl2_rag.llm.models.cuda_decoder import load_cuda_model
from exl2_rag.llm.models.registry import load_model
from exl2_rag.llm.models.tensor_names import FINAL_NORM_KEY
from exl2_rag.llm.output_text import TokenDecoder
from exl2_rag.llm.quantised_kv_cache import QuantisedKVCache
from exl2_rag.llm.request import GenerationRequest
from exl2_rag.llm.speculation.draft_model import DraftModel
from exl2_rag.llm.speculation.prompt_lookup import PromptLookup
from exl2_rag.llm.speculation.speculator import Speculator
from exl2_rag.llm.speculation.vocabulary_check import check_same_vocabulary
from exl2_rag.llm.token_healing import Healing, heal
from exl2_rag.llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from exl2_rag.llm.constraint import ConstraintMatcher

_logger = logging.getLogger(__name__)

NO_TIERS = TierOptions()
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An engine and what it was made of."""

    engine: Engine
    tokenizer: Tokenizer
    config: ModelConfig
    loras: LoraShelf


class TokenizerText:
    """A tokenizer as the engine wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tokens_with: dict[str, frozenset[int]] = {}

    def decoder(self, prompt: tuple[int, ...]) -> TokenDecoder:
        """A fresh decoder for what follows the prompt."""
        return self._tokenizer.incremental(after=prompt)

    def shown_text(self, token_ids: Seq[int]) -> str:
        """The text of any token ids, special tokens included."""
        return self._tokenizer.decode(token_ids, skip_special=False)

    def matcher(self, request: GenerationRequest) -> ConstraintMatcher | None:
        """A fresh matcher of the request's constraint. Raises ConstraintError if it cannot be enforced."""
        if request.constraint is None:
            return None
        return request.constraint.compile(self._tokenizer, self._vocab_size)

    def healing(self, prompt: tuple[int, ...]) -> Healing | None:
        """What of the prompt's end the continuation should begin with instead; None: nothing."""
        return heal(self._tokenizer, prompt)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; a part of a character reads as "\ufffd"."""
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")

    def tokens_with(self, text: str) -> frozenset[int]:
        """The ids of all tokens whose text contains `text`; if there is none, of the last one it is written with."""
        known = self._tokens_with.get(text)
        if known is None:
            sought = text.encode()
            token_bytes = self._tokenizer.token_bytes
            known = frozenset(one for one in range(self._tokenizer.vocab_size) if sought in token_bytes(one))
            known = known or frozenset(self._tokenizer.encode_continuation(text)[-1:])
            self._tokens_with[text] = known
        return known

    def special_tokens(self) -> frozenset[int]:
        """The ids that are no ordinary text."""
        return frozenset(one for one in range(self._tokenizer.vocab_size) if self._tokenizer.is_special(one))


def load_engine(model_dir: Path, options: EngineOptions, tiers: TierOptions = NO_TIERS) -> LoadedModel:
    """Read a model and make its engine.

    Raises:
        KVStoreError: the store of KV pages cannot be opened.
        ModelError: there is no usable model; the message names the directory.
        SettingsError: an option out of range, or one that this version does not have.
    """
    try:
        tiers.check()
        return _load(model_dir, options, tiers)
    except ModelError as error:
        if str(model_dir) in str(error):
            raise
        raise type(error)(f"{model_dir}: {error}") from error


def _load(model_dir: Path, options: EngineOptions, tiers: TierOptions) -> LoadedModel:
    config = ModelConfig.from_dir(model_dir)
    checkpoint = Checkpoint.open(model_dir)
    options = dataclasses.replace(options, device=choose_device(options.device))
    backend = None
    if options.device.startswith("cuda"):
        backend = cuda_runtime.backend(torch.device(options.device))
    tokenizer = Tokenizer.from_dir(model_dir)
    draft = _draft_files(options.draft_model, tokenizer)
    engine_config = _engine_config(config, checkpoint, options, draft)
    if options.num_threads is not None:
        set_num_threads(options.num_threads)
    device = torch.device(engine_config.device)
    with memory_errors(device):
        runner = _runner(model_dir, config, checkpoint, engine_config, backend)
        speculator = _speculator(options, draft, engine_config, backend, config.vocab_size)
    loras = LoraShelf(config, device)
    identity = CacheIdentity.of(model_dir, config, engine_config, hash_weights=tiers.survives_restart)
    engine = Engine(
        runner,
        engine_config,
        TokenizerText(tokenizer, config.vocab_size),
        vocab_size=config.vocab_size,
        eos_token_ids={*config.eos_token_ids, *tokenizer.eos_token_ids},
        identity=identity,
        loras=loras,
        tiers=open_tiers(tiers, identity, runner.cache, engine_config.page_size),
        speculator=speculator,
    )
    return LoadedModel(engine, tokenizer, config, loras)


@dataclass(frozen=True, slots=True)
class _DraftFiles:
    """A smaller model that guesses tokens."""

    model_dir: Path
    config: ModelConfig
    checkpoint: Checkpoint


def _draft_files(draft_model: str | Path | None, tokenizer: Tokenizer) -> _DraftFiles | None:
    """The files of the draft model, if it is one.

    Raises:
        ModelError: the directory holds no usable model.
        SettingsError: it has another tokenizer.
    """
    if draft_model is None or draft_model == PROMPT_LOOKUP:
        return None
    draft_dir = Path(draft_model).expanduser()
    if not draft_dir.is_dir():
        raise SettingsError(
            f"draft_model must be {PROMPT_LOOKUP!r} or the directory of a model, got {str(draft_model)!r}, where there "
            "is none"
        )
    try:
        config, checkpoint = ModelConfig.from_dir(draft_dir), Checkpoint.open(draft_dir)
        check_same_vocabulary(tokenizer, Tokenizer.from_dir(draft_dir), draft_dir)
    except ModelError as error:
        raise type(error)(f"draft_model {draft_dir}: {error}") from error
    return _DraftFiles(draft_dir, config, checkpoint)


def _speculator(
    options: EngineOptions,
    draft: _DraftFiles | None,
    engine_config: EngineConfig,
    backend: Backend | None,
    vocab_size: int,
) -> Speculator | None:
    """Who guesses tokens; None: nobody. A draft model's cache has as many pages as the large one's."""
    if options.draft_model is None:
        return None
    if draft is None:
        return Speculator(PromptLookup())
    draft_config = dataclasses.replace(
        engine_config, max_seq_len=min(engine_config.max_seq_len, draft.config.max_seq_len)
    )
    runner = _runner(draft.model_dir, draft.config, draft.checkpoint, draft_config, backend)
    return Speculator(DraftModel(runner, draft_config, vocab_size))


def _give_back_freed_memory() -> None:
    """Let the C library return what loading has freed: the tensors of the files, each as large as a matrix."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others need no asking
        if trim is not None:
            trim(0)


def choose_device(wanted: str) -> str:
    """ "auto" as the first card, if kernels can run on it, else the CPU; anything else as it is.

    A card that is there but cannot be used is worth a notice: somebody paid for it.
    """
    if wanted != "auto" or not torch.cuda.is_available():
        return "cpu" if wanted == "auto" else wanted
    problem = cuda_runtime.unusable_because(0)
    if problem is None:
        return "cuda:0"
    _logger.warning("running on the CPU, though there is a GPU: %s", problem)
    return "cpu"


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn torch's error about a card's memory into ours, which says what to do.

    Raises:
        DeviceMemoryError: the model or its cache does not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the model and its KV cache do not fit the memory of {device} ({str(error).splitlines()[0]}); close other "
            "programs that use the card (`nvidia-smi` lists them), give a smaller cache_tokens, a cache_dtype of 'q8' "
            "or 'q4', or a model of fewer bits"
        ) from error


def _runner(
    model_dir: Path,
    config: ModelConfig,
    checkpoint: Checkpoint,
    engine_config: EngineConfig,
    backend: Backend | None,
) -> ModelRunner:
    """The model and its cache, on their device."""
    device = torch.device(engine_config.device)
    limit = engine_config.max_seq_len
    if backend is None:
        model = load_model(
            model_dir, config, checkpoint, device=device, max_seq_len=limit, precision=engine_config.precision
        )
        _give_back_freed_memory()
        cache = make_cache(config, engine_config)
        tapes = DecodeTapes(model, cache, -(-limit // engine_config.page_size))
        tapes.prepare()
        return ModelRunner(model, cache, device, tapes, shares_prefixes=True)
    cuda_runtime.prepare(backend)
    cuda_model = load_cuda_model(
        model_dir,
        config,
        checkpoint,
        backend,
        device=device,
        max_seq_len=limit,
        precision=engine_config.precision,
        deterministic=engine_config.deterministic,
    )
    cache = make_cache(config, engine_config)
    graphs = DecodeGraphs(
        lambda inputs: cuda_model.forward(inputs, cache),
        device,
        max_pages=-(-engine_config.sequence_limit // engine_config.page_size),
    )
    # Reading a shared prefix by itself adds its share of the attention in another order.
    return ModelRunner(cuda_model, cache, device, graphs, shares_prefixes=not engine_config.deterministic)


def make_cache(config: ModelConfig, engine_config: EngineConfig) -> KVCache:
    """The pages, zeroed."""
    device = torch.device(engine_config.device)
    bits = QUANTISED_CACHE_BITS.get(engine_config.cache_dtype)
    if bits is not None:
        return QuantisedKVCache(
            n_layers=config.n_layers,
            n_pages=engine_config.n_pages,
            page_size=engine_config.page_size,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            bits=bits,
            device=device,
        )
    return KVCache(
        n_layers=config.n_layers,
        n_pages=engine_config.n_pages,
        page_size=engine_config.page_size,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        dtype=TORCH_DTYPES[engine_config.cache_dtype],
        device=device,
    )


def _engine_config(
    config: ModelConfig, checkpoint: Checkpoint, options: EngineOptions, draft: _DraftFiles | None
) -> EngineConfig:
    elements, weight_bytes = _cache_elements(config), checkpoint.total_bytes()
    if draft is not None:
        elements += _cache_elements(draft.config)
        weight_bytes += draft.checkpoint.total_bytes()
    norm = f"{FINAL_NORM_KEY}.weight"  # a plain tensor in every model; one that lacks it is refused when it is loaded
    shape = ModelShape(
        max_seq_len=config.max_seq_len,
        cache_elements_per_token=elements,
        fp32_weights=checkpoint.has(norm) and checkpoint.tensor(norm).dtype == torch.float32,
        head_dim=config.head_dim,
    )
    return resolve(
        options,
        shape,
        native=native_available(),
        free_bytes=max(0, _free_bytes(options.device) - weight_bytes),
    )


def _cache_elements(config: ModelConfig) -> int:
    """Numbers in the cache for one token."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return available_memory_bytes()

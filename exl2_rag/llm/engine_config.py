"""How an engine is run: the options of `ExL2LLM`, checked, with every default filled in. Knows no torch.

An option this version does not have yet is refused by name; nothing is quietly replaced by something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exl2_rag.errors import SettingsError

CACHE_DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
QUANTISED_CACHE_BITS = {"q8": 8, "q6": 6, "q4": 4}
QUANT_GROUP = 32  # numbers of a quantised cache that share a scale of 16 bits

PROMPT_LOOKUP = "prompt-lookup"

DEFAULT_PAGE_SIZE = 32
DEFAULT_BATCH_SIZE = 32
DEFAULT_BATCHED_TOKENS = 512
# Prefill beside running decodes is kept short, so that nobody waits long for the next token.
DEFAULT_PREFILL_BESIDE_DECODE = 128
# A card computes thousands of tokens in the time it takes to read the weights a few times.
CUDA_BATCHED_TOKENS = 2048
CUDA_PREFILL_BESIDE_DECODE = 512

# A step that also computes a prompt takes at most so many times as long as one that only decodes.
DEFAULT_MAX_INTER_TOKEN_GAP = 3.0
LEAST_INTER_TOKEN_GAP = 1.5
# A request of low priority that is always overtaken moves up after so many times.
DEFAULT_MAX_OVERTAKES = 8

CACHE_MEMORY_SHARE = 0.25  # of the memory that is free when the engine starts
CACHE_MEMORY_CAP_BYTES = 8 * 2**30
# Of a card's memory that is free beside the weights; the rest is for activations, CUDA graphs and torch's reserves.
CUDA_CACHE_MEMORY_SHARE = 0.8
ASSUMED_FREE_BYTES = 4 * 2**30  # where the system does not say
# "auto" keeps keys and values in fp32 where that costs next to nothing, or where the weights are fp32 themselves.
CHEAP_FP32_BYTES_PER_TOKEN = 16 * 2**10


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the caller asked for; None is "choose for me". Names and meanings are those of `ExL2LLM`."""

    device: str = "auto"
    max_seq_len: int | None = None
    cache_tokens: int | None = None
    cache_dtype: str = "auto"
    precision: str = "auto"
    max_batch_size: int | None = None
    num_threads: int | None = None
    page_size: int | None = None
    max_batched_tokens: int | None = None
    deterministic: bool = False
    max_waiting: int | None = None
    max_overtakes: int = DEFAULT_MAX_OVERTAKES
    max_inter_token_gap: float | None = DEFAULT_MAX_INTER_TOKEN_GAP
    draft_model: str | Path | None = None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the defaults depend on.

    Attributes:
        max_seq_len: tokens the model was made for.
        cache_elements_per_token: numbers in the cache for one token: 2 * layers * key/value heads * head dim.
        fp32_weights: the checkpoint's plain weights are float32.
        head_dim: numbers of one head.
    """

    max_seq_len: int
    cache_elements_per_token: int
    fp32_weights: bool
    head_dim: int = 128


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine needs to know beside the model. All sizes in tokens unless named otherwise.

    Attributes:
        max_seq_len: prompt and continuation together.
        n_pages, page_size: the KV cache.
        max_batch_size: sequences computed together.
        max_batched_tokens: new tokens of all sequences in one step.
        deterministic: no row's bits may depend on what else is computed with it.
        prefill_beside_decode: prefill tokens in a step in which other sequences decode, where no times are measured.
        max_waiting: requests that may wait beside `max_batch_size` running ones; None: any number.
        max_overtakes: how many requests of higher priority may be started ahead of one that has waited longer, before
            it is raised to the highest priority; 0: any number.
        max_inter_token_gap: how much longer than usual a step may take because of prefill, as a multiple; then the
            slices of prompts are chosen by measured times. None: by `prefill_beside_decode` alone.
        prefill_in_turns: while sequences decode, prompts are computed in steps of their own, one after each that
            decodes. Pays where a decode step is a recorded one, as on a processor; a card reads its weights only once
            for both.
    """

    max_seq_len: int
    n_pages: int
    page_size: int
    max_batch_size: int
    device: str = "cpu"
    cache_dtype: str = "fp32"
    precision: str = "exact"
    max_batched_tokens: int = DEFAULT_BATCHED_TOKENS
    deterministic: bool = False
    prefill_beside_decode: int = DEFAULT_PREFILL_BESIDE_DECODE
    max_waiting: int | None = None
    max_overtakes: int = DEFAULT_MAX_OVERTAKES
    max_inter_token_gap: float | None = None
    prefill_in_turns: bool = False

    @property
    def cache_tokens(self) -> int:
        """Tokens of KV cache for all sequences together."""
        return self.n_pages * self.page_size

    @property
    def sequence_limit(self) -> int:
        """Tokens a sequence can have at most: what the model takes and the cache holds."""
        return min(self.max_seq_len, self.cache_tokens)


def resolve(
    options: EngineOptions, shape: ModelShape, *, native: bool = False, free_bytes: int | None = None
) -> EngineConfig:
    """Check the options and fill in what was left open.

    Args:
        native: the compiled kernels are there; "auto" is "fast" with them and "exact" without.
        free_bytes: memory to choose the cache's size by; None asks the system.

    Raises:
        SettingsError: an option out of range, or one that this version does not have.
    """
    device = _device(options.device)
    on_card = device.startswith("cuda")
    precision = _precision(options.precision, native=native or on_card)
    if options.deterministic and not (native or on_card):
        raise SettingsError(
            "deterministic=True needs the compiled kernels, and there are none (see the notice about kernels); the "
            "reference kernels may differ in their last bits from one batch to another"
        )
    max_seq_len = shape.max_seq_len if options.max_seq_len is None else options.max_seq_len
    _require(
        2 <= max_seq_len <= shape.max_seq_len, "max_seq_len", f"from 2 to the model's {shape.max_seq_len}", max_seq_len
    )
    page_size = DEFAULT_PAGE_SIZE if options.page_size is None else options.page_size
    _require(page_size in (16, 32, 64, 128, 256), "page_size", "16, 32, 64, 128 or 256", page_size)
    cache_dtype = _cache_dtype(options.cache_dtype, shape, on_card=on_card, precision=precision)
    wanted_batch = DEFAULT_BATCH_SIZE if options.max_batch_size is None else options.max_batch_size
    _require(wanted_batch >= 1, "max_batch_size", "at least 1", wanted_batch)
    if options.cache_tokens is None:
        free = available_memory_bytes() if free_bytes is None else free_bytes
        budget = min(int(free * CACHE_MEMORY_SHARE), CACHE_MEMORY_CAP_BYTES)
        if on_card:
            budget = int(free * CUDA_CACHE_MEMORY_SHARE)
        fitting = int(budget // (shape.cache_elements_per_token * cache_bytes_per_element(cache_dtype)))
        # One page more than the longest sequence fills, so that it can share a page and copy its rows besides.
        n_pages = min(-(-max_seq_len // page_size) * wanted_batch + 1, fitting // page_size)
        _require(n_pages >= 1, "cache_tokens", "given, since too little memory is free to choose it", None)
    else:
        _require(options.cache_tokens >= 1, "cache_tokens", "at least 1", options.cache_tokens)
        n_pages = -(-options.cache_tokens // page_size)
    max_batch_size = min(wanted_batch, n_pages) if options.max_batch_size is None else wanted_batch
    batched = options.max_batched_tokens
    beside_decode = CUDA_PREFILL_BESIDE_DECODE if on_card else DEFAULT_PREFILL_BESIDE_DECODE
    if batched is None:
        batched = max(CUDA_BATCHED_TOKENS if on_card else DEFAULT_BATCHED_TOKENS, max_batch_size + beside_decode)
    least = max_batch_size + 16
    _require(batched >= least, "max_batched_tokens", f"at least {least} (max_batch_size + 16)", batched)
    if options.num_threads is not None:
        _require(options.num_threads >= 1, "num_threads", "at least 1", options.num_threads)
    if options.max_waiting is not None:
        _require(options.max_waiting >= 0, "max_waiting", "0 or more, or None (any number)", options.max_waiting)
    _require(options.max_overtakes >= 0, "max_overtakes", "0 (any number) or more", options.max_overtakes)
    gap = options.max_inter_token_gap
    _require(
        gap is None or gap >= LEAST_INTER_TOKEN_GAP,
        "max_inter_token_gap",
        f"at least {LEAST_INTER_TOKEN_GAP} (times the usual step), or None",
        gap,
    )
    return EngineConfig(
        max_seq_len=max_seq_len,
        n_pages=n_pages,
        page_size=page_size,
        max_batch_size=max_batch_size,
        device=device,
        cache_dtype=cache_dtype,
        precision=precision,
        max_batched_tokens=batched,
        deterministic=options.deterministic,
        prefill_beside_decode=min(beside_decode, batched),
        max_waiting=options.max_waiting,
        max_overtakes=options.max_overtakes,
        max_inter_token_gap=gap,
        prefill_in_turns=gap is not None and not on_card,
    )


def available_memory_bytes() -> int:
    """Memory this process could still take, as far as the system tells (Linux: cgroup limits count)."""
    found = [value for value in (_meminfo_available(), _cgroup_available()) if value is not None]
    return min(found) if found else ASSUMED_FREE_BYTES


def _meminfo_available() -> int | None:
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not (limit.is_file() and used.is_file()):
        return None
    text = limit.read_text(encoding="ascii").strip()
    return None if text == "max" else max(0, int(text) - int(used.read_text(encoding="ascii")))


def cache_bytes_per_element(cache_dtype: str) -> float:
    """Bytes of cache for one number, in a quantised cache with its share of the scale."""
    if cache_dtype in QUANTISED_CACHE_BITS:
        return (QUANTISED_CACHE_BITS[cache_dtype] + 16 / QUANT_GROUP) / 8
    return CACHE_DTYPE_BYTES[cache_dtype]


def _device(device: str) -> str:
    """ "auto" is for the caller to decide, who can look for a card; left to this, it is the CPU."""
    if device in ("auto", "cpu"):
        return "cpu"
    if device == "cuda":
        return "cuda:0"
    if device.startswith("cuda:") and device.removeprefix("cuda:").isdecimal():
        return device
    raise SettingsError(f"device must be 'auto', 'cpu', 'cuda' or such as 'cuda:1', got {device!r}")


def _precision(precision: str, *, native: bool) -> str:
    if precision == "auto":
        return "fast" if native else "exact"
    if precision in ("exact", "fast"):
        return precision
    raise SettingsError(f"precision must be 'auto', 'exact' or 'fast', got {precision!r}")


def _cache_dtype(cache_dtype: str, shape: ModelShape, *, on_card: bool, precision: str) -> str:
    if cache_dtype == "auto":
        if on_card:
            return "fp16" if precision == "fast" else "fp32"
        is_cheap = shape.cache_elements_per_token * 4 <= CHEAP_FP32_BYTES_PER_TOKEN
        return "fp32" if shape.fp32_weights or is_cheap else "fp16"
    if cache_dtype in CACHE_DTYPE_BYTES:
        return cache_dtype
    known = ", ".join(f"'{name}'" for name in ("auto", *CACHE_DTYPE_BYTES))
    if cache_dtype in QUANTISED_CACHE_BITS:
        if shape.head_dim % QUANT_GROUP:
            raise SettingsError(
                f"cache_dtype={cache_dtype!r} needs heads of a multiple of {QUANT_GROUP} numbers, those of this model "
                f"have {shape.head_dim}; use one of: {known}"
            )
        return cache_dtype
    known += "".join(f", '{name}'" for name in QUANTISED_CACHE_BITS)
    raise SettingsError(f"cache_dtype must be one of: {known}, got {cache_dtype!r}")


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise SettingsError(f"{name} must be {expected}, got {got!r}")

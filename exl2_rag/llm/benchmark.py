"""Measures an engine through its public face: prefill and decode speed, bytes read for a token, memory.

Every run has prompts of its own, drawn at random, so that none finds a prefix in the cache. Knows no command line.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from exl2_rag.errors import EngineError, SettingsError
from exl2_rag.llm.api import ExL2LLM
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.request import SamplingParams, StreamPiece

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head."


@dataclass(frozen=True, slots=True)
class BenchmarkRun:
    """One batch of prompts, prefilled and continued.

    Attributes:
        prefill_tokens: prompt tokens of all sequences.
        prefill_s: from the request to the first token of the last sequence.
        decode_tokens: new tokens of all sequences while all were decoding.
        decode_s: how long that was.
        token_s: the times between one token and the next, of every sequence, in that span.
    """

    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    token_s: tuple[float, ...]

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens a second."""
        return self.prefill_tokens / self.prefill_s

    @property
    def decode_tok_s(self) -> float:
        """New tokens a second, of all sequences together."""
        return self.decode_tokens / self.decode_s


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """Sizes of a model on disk.

    Attributes:
        file_bytes: all tensors.
        weight_bytes_per_token: what one decoded token reads: every matrix, the head, one row of the embedding.
        bits_per_weight: average over the matrices of the decoder's layers, tables included.
    """

    file_bytes: int
    weight_bytes_per_token: int
    bits_per_weight: float


class EngineBenchmark:
    """Runs batches of random prompts through an engine.

    Args:
        llm: the engine; should serve nobody else meanwhile.
        prompt_tokens, new_tokens: of each sequence; at least 1 and 2.
        batch_size: sequences at a time.
        seed: of the prompts.

    Raises:
        SettingsError: a number out of range.
    """

    def __init__(
        self, llm: ExL2LLM, *, prompt_tokens: int, new_tokens: int, batch_size: int = 1, seed: int = 0
    ) -> None:
        for name, value, least in (
            ("prompt_tokens", prompt_tokens, 1),
            ("new_tokens", new_tokens, 2),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise SettingsError(f"{name} must be at least {least}, got {value}")
        self._llm = llm
        self._prompt_tokens = prompt_tokens
        self._batch_size = batch_size
        self._random = random.Random(seed)
        self._sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)

    def run(self) -> BenchmarkRun:
        """Prefill and continue one batch.

        Raises:
            EngineError: the engine gave fewer tokens than asked for, or the sequences never decoded all together.
        """
        vocab = range(self._llm.config.vocab_size)
        prompts = [self._random.choices(vocab, k=self._prompt_tokens) for _ in range(self._batch_size)]
        # A stream is checked and prepared here, and submitted when its first piece is asked for.
        pieces = [self._llm.stream(prompt, self._sampling) for prompt in prompts]
        started = time.perf_counter()
        if self._batch_size == 1:
            streams = [self._arrivals(pieces[0])]
        else:
            with ThreadPoolExecutor(self._batch_size) as pool:
                barrier = threading.Barrier(self._batch_size)
                streams = list(pool.map(lambda one: self._arrivals(one, barrier), pieces))
        first = max(arrivals[0][0] for arrivals in streams)
        last = min(arrivals[-1][0] for arrivals in streams)
        decode_tokens = sum(n for arrivals in streams for at, n in arrivals if first < at <= last)
        if decode_tokens == 0:
            raise EngineError(
                "one sequence had ended before the last one began; ask for more new tokens or a smaller batch"
            )
        return BenchmarkRun(
            prefill_tokens=self._batch_size * self._prompt_tokens,
            prefill_s=first - started,
            decode_tokens=decode_tokens,
            decode_s=last - first,
            token_s=tuple(gap for arrivals in streams for gap in _gaps(arrivals, first, last)),
        )

    def _arrivals(
        self, pieces: Iterable[StreamPiece], barrier: threading.Barrier | None = None
    ) -> list[tuple[float, int]]:
        """When tokens arrived, and how many; starts when all others at the barrier do."""
        if barrier is not None:
            barrier.wait()
        arrivals = [(time.perf_counter(), len(piece.token_ids)) for piece in pieces]
        count = sum(n for _, n in arrivals)
        if count != self._sampling.max_tokens:
            raise EngineError(f"expected {self._sampling.max_tokens} new tokens, the engine gave {count}")
        return arrivals


def cache_tokens_for(prompt_tokens: int, new_tokens: int, batch_size: int, page_size: int) -> int:
    """A KV cache that holds one batch, and one page more."""
    return (batch_size * math.ceil((prompt_tokens + new_tokens) / page_size) + 1) * page_size


def model_bytes(model_dir: Path) -> ModelBytes:
    """Sizes of a model's tensors, from the headers alone.

    Raises:
        ModelError: there is no usable model.
    """
    checkpoint = Checkpoint.open(model_dir)
    names = checkpoint.names()
    # Everything but norms and biases; a quantised matrix is all of its tensors.
    matrices = [
        name for name in names if not (name.endswith((".weight", ".bias")) and len(checkpoint.shape(name)) != 2)
    ]
    has_head = any(name.startswith(_HEAD) for name in names)
    read = [name for name in matrices if name != _EMBEDDING or not has_head]
    row_bytes = 0
    if checkpoint.has(_EMBEDDING):
        row_bytes = checkpoint.total_bytes([_EMBEDDING]) // checkpoint.shape(_EMBEDDING)[0]
    decoder = [name for name in matrices if name != _EMBEDDING and not name.startswith(_HEAD)]
    n_weights = sum(_weights_in(checkpoint, name) for name in decoder)
    return ModelBytes(
        file_bytes=checkpoint.total_bytes(),
        weight_bytes_per_token=checkpoint.total_bytes(read) + row_bytes,
        bits_per_weight=checkpoint.total_bytes(decoder) * 8 / n_weights if n_weights else 0.0,
    )


def _weights_in(checkpoint: Checkpoint, name: str) -> int:
    """Weights of a matrix, counted at the tensor that tells; 0 at its other tensors."""
    key, _, part = name.rpartition(".")
    if part == "q_weight":
        return checkpoint.shape(name)[1] * checkpoint.shape(f"{key}.q_invperm")[0]
    if part == "qweight":
        return 8 * math.prod(checkpoint.shape(name))
    return math.prod(checkpoint.shape(name)) if part == "weight" else 0


def _gaps(arrivals: Sequence[tuple[float, int]], first: float, last: float) -> list[float]:
    """The time of each token since the one before it, within a span; tokens that came together share it."""
    gaps: list[float] = []
    for (before, _), (at, n) in itertools.pairwise(arrivals):
        if first <= before and at <= last:
            gaps += [(at - before) / n] * n
    return gaps

"""Models with random weights, made in the card's own memory: to measure speed on, without a file.

The layout is a converter's: a few rows of more bits first, one permutation for the matrices that share an input, a head
of 6 bits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.cuda_graphs import DecodeGraphs
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.kernels import cuda_prepare, cuda_weights
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.kernels.cuda_weights import CudaWeights
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.layers.cuda_linear import PackedLinear
from exl2_rag.llm.layers.norm import RMSNorm
from exl2_rag.llm.layers.rotary import Rotary
from exl2_rag.llm.model_runner import ModelRunner
from exl2_rag.llm.models.cuda_decoder import CudaDecoder, CudaLayer
from exl2_rag.llm.request import GenerationRequest, SamplingParams
from exl2_rag.llm.sequence import Sequence

HEAD_BITS = 6
GROUP_ROWS = 128
PAGE_SIZE = 32
BATCHED_TOKENS = 2048


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES: Final = {
    "llama-1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128256),
}


def groups_for(in_features: int, bits: float) -> list[tuple[int, int]]:
    """(bits, rows) of groups that come to about `bits` a weight without scales: some rows two bits wider than most."""
    widths = (2, 3, 4, 5, 6, 8)
    low = max(width for width in widths if width <= bits)
    high = next((width for width in widths if width >= low + 2), 8)
    share = 0.0 if high == low else max(0.0, (bits - low) / (high - low))
    wide_rows = round(share * in_features / 32) * 32
    return [(high, wide_rows), (low, in_features - wide_rows)]


def random_matrix(
    in_features: int,
    out_features: int,
    runs: list[tuple[int, int]],
    device: torch.device,
    *,
    seed: int,
    invperm: Tensor | None = None,
) -> CudaWeights:
    """A matrix of random codes; runs: (bits, rows), cut into groups of 128 rows here."""
    generator = torch.Generator(device=device).manual_seed(seed)
    pairs, packed_rows, scale_max = [], 0, []
    for bits, rows in runs:
        for first in range(0, rows, GROUP_ROWS):
            pairs += [bits, packed_rows]
            packed_rows += min(GROUP_ROWS, rows - first) * bits // 32
            # Codes spread over 2^bits values; the product of a row of variance 1 is to have variance about 1.
            scale_max.append(6.0 / (1 << bits) / in_features**0.5)
    words = torch.randint(
        -(1 << 31), (1 << 31) - 1, (packed_rows, out_features), dtype=torch.int64, device=device, generator=generator
    )
    scales = torch.randint(
        -(1 << 31),
        (1 << 31) - 1,
        (len(scale_max), out_features // 8),
        dtype=torch.int64,
        device=device,
        generator=generator,
    )
    if invperm is None:
        invperm = torch.randperm(in_features, device=device, generator=generator)
    return cuda_prepare.exl2_prepare(
        words.to(torch.int32),
        torch.tensor([number if number < 1 << 15 else number - (1 << 16) for number in pairs], dtype=torch.int16),
        scales.to(torch.int32),
        torch.tensor(scale_max, dtype=torch.float16, device=device),
        invperm.to(torch.int32),
    )


class NoText:
    """Text tools of an engine whose texts nobody reads."""

    def decoder(self, prompt: tuple[int, ...]) -> Any:
        return self

    def shown_text(self, token_ids: Any) -> str:
        return ""

    def token_text(self, token_id: int) -> str:
        return ""

    def tokens_with(self, text: str) -> frozenset[int]:
        return frozenset()

    def special_tokens(self) -> frozenset[int]:
        return frozenset()

    def matcher(self, request: GenerationRequest) -> None:
        return None

    def healing(self, prompt: tuple[int, ...]) -> None:
        return None

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def state(self) -> None:
        return None

    def restore(self, state: object) -> None:
        del state


class SpeedModel:
    """A decoder of random weights, and engines to run it."""

    def __init__(self, shape: Shape, bits: float, backend: Backend, device: torch.device) -> None:
        self.shape = shape
        self._backend = backend
        self._device = device
        self._seed = 0
        self._positions = 0
        self._decoder: CudaDecoder | None = None
        self._bits = bits
        self._linears: list[PackedLinear] = []
        hidden, inner = shape.hidden, shape.intermediate
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._layers = [
            CudaLayer(
                input_norm=self._norm(),
                qkv=self._linear(hidden, q_width, kv_width, kv_width),
                o_proj=self._linear(q_width, hidden),
                mlp_norm=self._norm(),
                gate_up=self._linear(hidden, inner, inner),
                down_proj=self._linear(inner, hidden),
                sliding_window=0,
            )
            for _ in range(shape.layers)
        ]
        self._head = self._linear(hidden, shape.vocab, bits=HEAD_BITS)
        self._embedding = torch.randn((shape.vocab, hidden), device=device).half()
        self._final_norm = self._norm()

    def _norm(self) -> RMSNorm:
        return RMSNorm(torch.ones(self.shape.hidden, device=self._device), 1e-5)

    def _linear(self, in_features: int, *widths: int, bits: float | None = None) -> PackedLinear:
        generator = torch.Generator().manual_seed(self._seed)
        invperm = torch.randperm(in_features, generator=generator).to(self._device)
        runs = [run for run in groups_for(in_features, self._bits if bits is None else bits) if run[1] > 0]
        parts = []
        for width in widths:
            self._seed += 1
            parts.append(
                random_matrix(in_features, -(-width // 32) * 32, runs, self._device, seed=self._seed, invperm=invperm)
            )
        weights = parts[0] if len(parts) == 1 else cuda_weights.stack(parts)
        linear = PackedLinear(self._backend, weights, None, tuple(widths))
        if bits is None:
            self._linears.append(linear)  # of the layers
        return linear

    def _matrices(self) -> list[CudaWeights]:
        return [part.weights for part in self._linears]

    @property
    def weight_bytes(self) -> int:
        return self.weight_bytes_per_token + self._embedding.nbytes

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of matrices read for one step."""
        return sum(matrix.nbytes for matrix in self._matrices()) + self._head.weights.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Of the layers' matrices, scales included."""
        weights = sum(matrix.in_features * matrix.out_features for matrix in self._matrices())
        return 8 * sum(matrix.nbytes for matrix in self._matrices()) / weights

    def flops(self, n_tokens: int) -> float:
        """Operations of the matrices of a prompt's layers."""
        return 2.0 * n_tokens * sum(matrix.in_features * matrix.out_features for matrix in self._matrices())

    def prompt(self, length: int, *, seed: int) -> tuple[int, ...]:
        return tuple(random.Random(seed).randrange(self.shape.vocab) for _ in range(length))

    def engine(self, *, batch_size: int, max_seq_len: int) -> Engine:
        """An engine over the model with a cache for `batch_size` full sequences, and as many prefixes besides."""
        decoder = self._decoder_for(max_seq_len)
        n_pages = 2 * batch_size * (-(-max_seq_len // PAGE_SIZE) + 1)
        config = EngineConfig(
            max_seq_len=max_seq_len,
            n_pages=n_pages,
            page_size=PAGE_SIZE,
            max_batch_size=batch_size,
            device=str(self._device),
            cache_dtype="fp16",
            precision="fast",
            max_batched_tokens=BATCHED_TOKENS,
            prefill_beside_decode=BATCHED_TOKENS // 4,
        )
        cache = KVCache(
            n_layers=self.shape.layers,
            n_pages=n_pages,
            page_size=PAGE_SIZE,
            n_kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            dtype=torch.float16,
            device=self._device,
        )
        graphs = None
        if self._device.type == "cuda":
            width = -(-max_seq_len // PAGE_SIZE)
            graphs = DecodeGraphs(lambda inputs: decoder.forward(inputs, cache), self._device, max_pages=width)
        runner = ModelRunner(decoder, cache, self._device, graphs, shares_prefixes=True)
        return Engine(runner, config, NoText(), vocab_size=self.shape.vocab)

    def _decoder_for(self, max_seq_len: int) -> CudaDecoder:
        if self._decoder is None or self._positions < max_seq_len:
            self._positions = max_seq_len
            self._decoder = self._new_decoder(max_seq_len)
        return self._decoder

    def _new_decoder(self, max_seq_len: int) -> CudaDecoder:
        shape = self.shape
        config = ModelConfig.from_dict(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": shape.hidden,
                "intermediate_size": shape.intermediate,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "vocab_size": shape.vocab,
                "max_position_embeddings": max_seq_len,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500_000.0,
                "hidden_act": "silu",
                "tie_word_embeddings": False,
            }
        )
        return CudaDecoder(
            config,
            self._backend,
            dtype=torch.float16,
            embedding=self._embedding,
            layers=self._layers,
            norm=self._final_norm,
            head=self._head,
            rotary=Rotary(config.rope, rotary_dim=shape.head_dim, max_seq_len=max_seq_len, device=self._device),
        )

    def start(self, engine: Engine, prompts: list[tuple[int, ...]], n_new: int) -> list[Sequence]:
        sampling = SamplingParams(max_tokens=n_new, temperature=0.0, ignore_eos=True)
        sequences = [engine.prepare(GenerationRequest(prompt, sampling=sampling)) for prompt in prompts]
        for sequence in sequences:
            engine.add(sequence)
        return sequences

    def step(self, engine: Engine) -> None:
        for update in engine.step():
            if update.error is not None:
                raise update.error

    def run(self, engine: Engine, prompts: list[tuple[int, ...]], n_new: int) -> None:
        self.start(engine, prompts, n_new)
        while engine.has_work:
            self.step(engine)

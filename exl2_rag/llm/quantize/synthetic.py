"""Writes EXL2 models of a given shape with random weights, to measure speed and memory on.

The files are what ExLlamaV2's converter leaves: its layouts of widths and groups, its names, one permutation for q, k
and v and one for gate and up, an own head. Codes are drawn packed, so a model is written about as fast as the disk
takes it; scales are chosen so that every matrix keeps the variance of what it multiplies. The models say nothing
sensible.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exl2_rag.errors import CheckpointError, SettingsError
from exl2_rag.llm.checkpoint.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter
from exl2_rag.llm.kernels.weights import CHUNK_ROWS
from exl2_rag.llm.quantize.candidates import (
    HEAD_PLANS,
    BlockOption,
    MatrixSize,
    attention_options,
    choose_options,
    mlp_options,
)
from exl2_rag.llm.quantize.convert_rtn import ConversionReport
from exl2_rag.llm.quantize.rtn import QuantisationPlan, padded

HEAD_BITS = 6
BITS_TOLERANCE = 0.02
"""How far, as a share, the attained bits per weight may be from those asked for."""

_FORMAT = 1  # part of a cached model's name; raise it when what is written for the same arguments changes
_BYTE_TOKENS, _BOS, _EOS = 256, "<s>", "</s>"
_LEAST_VOCAB = _BYTE_TOKENS + 2
_SENSITIVITY_SPREAD = 0.7  # so that layers choose differently, as they do when they are measured
_INT8_STD = math.sqrt((256**2 - 1) / 12)
_SLAB_ROWS = 4096

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class SyntheticShape:
    """The sizes of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    rope_theta: float = 10000.0
    max_position: int = 16384

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.intermediate, self.layers, self.heads, self.kv_heads)
        if min(sizes) < 1 or self.hidden % self.heads or self.heads % self.kv_heads:
            raise SettingsError(f"heads must divide the width and kv_heads the heads, the shape is {self}")
        if self.hidden % CHUNK_ROWS or self.intermediate % CHUNK_ROWS:
            raise SettingsError(f"EXL2 needs widths that are multiples of {CHUNK_ROWS}, the shape is {self}")
        if self.vocab < _LEAST_VOCAB:
            raise SettingsError(f"a vocabulary needs at least {_LEAST_VOCAB} tokens, the shape has {self.vocab}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


SHAPES: Mapping[str, SyntheticShape] = {
    "llama-1.1b": SyntheticShape(2048, 5632, 22, 32, 4, 32000),
    "llama-8b": SyntheticShape(4096, 14336, 32, 32, 8, 128256, rope_theta=500000.0),
}
"""Shapes by name: TinyLlama's and Llama 3's."""


def shape_by_name(name: str) -> SyntheticShape:
    """A named shape.

    Raises:
        SettingsError: there is none of that name.
    """
    if name not in SHAPES:
        raise SettingsError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
    return SHAPES[name]


def synthetic_model_dir(cache_dir: Path, name: str, *, bits: float, head_bits: int = HEAD_BITS) -> Path:
    """Where in a cache the synthetic model of a named shape stands, or will stand."""
    return cache_dir / f"{name}-{bits:g}bpw-h{head_bits}-v{_FORMAT}"


def ensure_synthetic_model(target_dir: Path, shape: SyntheticShape, *, bits: float, head_bits: int = HEAD_BITS) -> None:
    """Write a synthetic model unless the directory holds one; it appears complete or not at all.

    Raises:
        SettingsError: see `write_synthetic_model`.
        CheckpointError: the directory is there, but holds no complete model.
    """
    if is_complete(target_dir):
        return
    partial = target_dir.with_name(f"{target_dir.name}.partial-{os.getpid()}")
    try:
        write_synthetic_model(partial, shape, bits=bits, head_bits=head_bits)
        try:
            partial.rename(target_dir)
        except OSError as error:
            # Another process may have written the same model meanwhile; it is equal, bit for bit.
            if not is_complete(target_dir):
                raise CheckpointError(
                    f"{target_dir} cannot be made: {error}; remove it or give another folder"
                ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_complete(model_dir: Path) -> bool:
    """Whether a directory holds all of a synthetic model: its config.json is written last."""
    return (model_dir / "config.json").is_file()


def write_synthetic_model(
    target_dir: Path,
    shape: SyntheticShape,
    *,
    bits: float,
    head_bits: int = HEAD_BITS,
    seed: int = 0,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> ConversionReport:
    """Write a model that `ExL2LLM` loads. The same arguments give the same bytes.

    Args:
        target_dir: where it goes; must hold no safetensors yet. config.json appears last.
        shape: its sizes.
        bits: average bits per weight of the decoder's matrices on disk, scales and tables included.
        head_bits: 2, 3, 4, 5, 6 or 8; the head is not part of the average.
        shard_bytes: most bytes of one file, and of memory; a larger tensor has a file to itself.

    Raises:
        SettingsError: bits that cannot be had to within 2 %.
        CheckpointError: the directory holds a model already.
    """
    if head_bits not in HEAD_PLANS:
        raise SettingsError(f"head_bits must be one of {sorted(HEAD_PLANS)}, it is {head_bits}")
    if not math.isfinite(bits) or bits <= 0:
        raise SettingsError(f"bits must be a positive number, it is {bits}")
    rng = np.random.Generator(np.random.SFC64(seed))
    chosen, attained = _choose(shape, bits, rng)
    n_linears = 0
    with ShardWriter(target_dir, shard_bytes) as writer:
        writer.add("model.embed_tokens.weight", _embedding(rng, shape.vocab, shape.hidden))
        for layer, (attention, mlp) in enumerate(chosen):
            prefix = f"model.layers.{layer}"
            writer.add(f"{prefix}.input_layernorm.weight", _norm(rng, shape.hidden))
            writer.add(f"{prefix}.post_attention_layernorm.weight", _norm(rng, shape.hidden))
            for size, plan, invperm in _layer_matrices(rng, shape, attention, mlp):
                _add_matrix(writer, f"{prefix}.{size.role}", _random_matrix(rng, size, plan, invperm))
                n_linears += 1
        writer.add("model.norm.weight", _norm(rng, shape.hidden))
        head = MatrixSize("lm_head", shape.hidden, shape.vocab)
        _add_matrix(
            writer, "lm_head", _random_matrix(rng, head, HEAD_PLANS[head_bits], _permutation(rng, shape.hidden))
        )
    _write_json(target_dir / "tokenizer.json", _tokenizer(shape.vocab))
    _write_json(target_dir / "tokenizer_config.json", {"bos_token": _BOS, "eos_token": _EOS, "add_bos_token": True})
    _write_json(target_dir / "config.json", _config(shape, bits, head_bits))
    return ConversionReport(
        target_dir=target_dir,
        bits_per_weight=attained,
        n_linears=n_linears + 1,
        n_bytes=sum(path.stat().st_size for path in target_dir.glob("*.safetensors")),
    )


def _block_sizes(shape: SyntheticShape) -> tuple[tuple[MatrixSize, ...], tuple[MatrixSize, ...]]:
    """(q, k, v, o) and (gate, up, down) of a layer."""
    hidden, kv_width = shape.hidden, shape.kv_heads * shape.head_dim
    attention = (
        MatrixSize("self_attn.q_proj", hidden, hidden),
        MatrixSize("self_attn.k_proj", hidden, kv_width),
        MatrixSize("self_attn.v_proj", hidden, kv_width),
        MatrixSize("self_attn.o_proj", hidden, hidden),
    )
    mlp = (
        MatrixSize("mlp.gate_proj", hidden, shape.intermediate),
        MatrixSize("mlp.up_proj", hidden, shape.intermediate),
        MatrixSize("mlp.down_proj", shape.intermediate, hidden),
    )
    return attention, mlp


def _choose(
    shape: SyntheticShape, bits: float, rng: np.random.Generator
) -> tuple[list[tuple[BlockOption, BlockOption]], float]:
    """The layout of attention and MLP of every layer, and the bits per weight they come to."""
    attention, mlp = _block_sizes(shape)
    options = [attention_options(*attention), mlp_options(*mlp)] * shape.layers
    elements = shape.layers * sum(size.in_features * padded(size.out_features) for size in (*attention, *mlp))
    sensitivities = rng.lognormal(0.0, _SENSITIVITY_SPREAD, len(options)).tolist()
    chosen = choose_options(options, sensitivities, math.floor(bits * elements))
    attained = sum(option.total_bits for option in chosen) / elements
    if attained < bits * (1 - BITS_TOLERANCE):
        raise SettingsError(
            f"{bits:g} bits per weight cannot be had with this shape, the nearest below is {attained:.3f}; ask for that"
        )
    return list(zip(chosen[0::2], chosen[1::2], strict=True)), attained


def _layer_matrices(
    rng: np.random.Generator, shape: SyntheticShape, attention: BlockOption, mlp: BlockOption
) -> Iterator[tuple[MatrixSize, QuantisationPlan, Tensor]]:
    """Each matrix of a layer with its layout and permutation; matrices that read the same input share the latter."""
    (q, k, v, o), (gate, up, down) = _block_sizes(shape)
    for members, option in (((q, k, v, o), attention), ((gate, up, down), mlp)):
        shared, own = _permutation(rng, members[0].in_features), _permutation(rng, members[-1].in_features)
        for size, plan in zip(members, option.plans, strict=True):
            yield size, plan, own if size is members[-1] else shared


def _add_matrix(writer: ShardWriter, key: str, parts: Mapping[str, Tensor]) -> None:
    for part, tensor in parts.items():
        # Clones: matrices that share a permutation share memory, which the file library refuses.
        writer.add(f"{key}.{part}", tensor.clone() if part == "q_invperm" else tensor)


def _random_matrix(
    rng: np.random.Generator, size: MatrixSize, plan: QuantisationPlan, invperm: Tensor
) -> dict[str, Tensor]:
    """The EXL2 tensors of one matrix whose weights have mean 0 and variance 1/K."""
    width = padded(size.out_features)
    groups = plan.groups(size.in_features)
    packed: list[Words] = []
    pairs: list[int] = []
    maxima: list[float] = []
    first_packed = 0
    nibbles = rng.integers(8, 16, size=(len(groups), width // 8, 8), dtype=np.uint32)
    # The scale of a column is ((nibble + 1) / 16)**2 of its group's largest; this is its root mean square.
    scale_rms = math.sqrt(sum(((nibble + 1) / 16) ** 4 for nibble in range(8, 16)) / 8)
    for bits, rows in groups:
        pairs += [bits, first_packed - (1 << 16) if first_packed >= 1 << 15 else first_packed]
        first_packed += rows * bits // CHUNK_ROWS
        maxima.append(1 / math.sqrt(size.in_features) / (_code_std(bits) * scale_rms))
    for bits in plan.bits:
        rows = sum(n for width_bits, n in groups if width_bits == bits)
        if rows:
            packed.append(_random_codes(rng, bits, rows // CHUNK_ROWS, width))
    scales = np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    return {
        "q_weight": torch.from_numpy(np.concatenate(packed).view(np.int32)),
        "q_invperm": invperm,
        "q_groups": torch.tensor(pairs, dtype=torch.int16),
        "q_scale": torch.from_numpy(scales.view(np.int32)),
        "q_scale_max": torch.tensor(maxima, dtype=torch.float16),
    }


def _random_codes(rng: np.random.Generator, bits: int, n_chunks: int, width: int) -> Words:
    """Packed codes [n_chunks * bits, width] whose values, code - 2**(bits - 1), have mean 0.

    Even codes would have mean -1/2, which narrow codes turn into a large common part of all outputs. So the top bit of
    a code is 1 a little more often, with probability 1/2 + 2**-bits: it is or-ed with the `and` of bits - 1 other
    random bits. Those are drawn once for a matrix and taken at another column in each chunk.
    """
    words = _random_words(rng, n_chunks * bits * width).reshape(n_chunks, bits, width)
    rare = np.bitwise_and.reduce(_random_words(rng, (bits - 1) * bits * width).reshape(bits - 1, bits, width), axis=0)
    place = np.arange(bits * 32).reshape(bits, 32)
    is_top = (place % bits == bits - 1).astype(np.uint32)
    top_bits = np.bitwise_or.reduce(is_top << np.arange(32, dtype=np.uint32), axis=1)
    twice = np.tile(rare & top_bits[:, None], (1, 2))
    for chunk, shift in zip(words, rng.integers(0, width, size=n_chunks), strict=True):
        np.bitwise_or(chunk, twice[:, shift : shift + width], out=chunk)
    return words.reshape(n_chunks * bits, width)


def _random_words(rng: np.random.Generator, count: int) -> Words:
    """[count] random words; `count` is even. Drawn 64 bits at a time, which is twice as fast."""
    return rng.integers(0, 1 << 64, size=count // 2, dtype=np.uint64).view(np.uint32)


def _code_std(bits: int) -> float:
    """Standard deviation of the values that `_random_codes` draws: a top bit, and evenly drawn bits below it."""
    top, share = 1 << (bits - 1), 0.5 + 2.0**-bits
    return math.sqrt(top**2 * share * (1 - share) + (top**2 - 1) / 12)


def _permutation(rng: np.random.Generator, in_features: int) -> Tensor:
    return torch.from_numpy(rng.permutation(in_features).astype(np.int32))


def _norm(rng: np.random.Generator, width: int) -> Tensor:
    return torch.from_numpy((1 + 0.1 * rng.standard_normal(width)).astype(np.float16))


def _embedding(rng: np.random.Generator, vocab: int, hidden: int) -> Tensor:
    """[V, hidden] float16 of variance 1, from evenly drawn bytes."""
    table = torch.empty((vocab, hidden), dtype=torch.float16)
    for start in range(0, vocab, _SLAB_ROWS):
        slab = table[start : start + _SLAB_ROWS]
        drawn = _random_words(rng, slab.numel() // 4).view(np.int8).reshape(slab.shape)
        slab.copy_(torch.from_numpy(drawn.astype(np.float32) / _INT8_STD))
    return table


def _config(shape: SyntheticShape, bits: float, head_bits: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": _BYTE_TOKENS,
        "eos_token_id": _BYTE_TOKENS + 1,
        "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "exl2",
            "version": "exl2-rag",
            "bits": bits,
            "head_bits": head_bits,
            "calibration": {"rows": 0, "length": 0, "dataset": f"(none: random weights for {asdict(shape)})"},
        },
    }


def _tokenizer(vocab: int) -> dict[str, Any]:
    """A token for each byte, begin and end of sequence, and made-up words for the other ids: every id has a text."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    specials = {_BOS: _BYTE_TOKENS, _EOS: _BYTE_TOKENS + 1}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    words = {f"x{token_id:x}": token_id for token_id in range(_LEAST_VOCAB, vocab)}
    return {
        "version": "1.0",
        "added_tokens": [{"id": n, "content": text, "special": True, **flags} for text, n in specials.items()],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())} | specials | words,
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """The printable character by which byte-level vocabularies write each byte: itself if Latin-1 prints it."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(_BYTE_TOKENS) if byte not in printable]
    return [chr(byte if byte in printable else _BYTE_TOKENS + hidden.index(byte)) for byte in range(_BYTE_TOKENS)]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(path)

"""Small model directories with random weights, written without transformers or a network.

The weights are spread like those of a trained model, not like an initialisation: every norm weight differs from 1,
every bias from 0, and the logits are far from flat. What a missing tensor would hide, these show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support import byte_tokenizer

DEFAULT_VOCAB = byte_tokenizer.VOCAB_SIZE
WEIGHT_STD = 0.15
MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}

# (bits, rows) of a quantised matrix's first groups; the last entry repeats until the rows are used up.
GROUP_LAYOUTS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((6, 32), (4, 32)),
    ((8, 32), (5, 64), (4, 64)),
    ((5, 32), (3, 32)),
    ((6, 64), (5, 128)),
)


def make_model_dir(
    path: Path,
    *,
    architecture: str = "LlamaForCausalLM",
    quantised: bool = False,
    hidden: int = 128,
    intermediate: int = 256,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = DEFAULT_VOCAB,
    seed: int = 0,
    max_position: int = 512,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> Path:
    """Write `config.json`, `model.safetensors` and the byte tokenizer into `path`; return `path`.

    `quantised` writes every matrix but the embedding as EXL2 tensors of mixed widths, the rest as float16; inner sizes
    must then be multiples of 32. `dtype` is that of unquantised weights. A vocabulary too small for the byte tokenizer
    goes without one. `config_overrides` replace or add keys of `config.json` and are honoured in the tensors
    (`head_dim`, `tie_word_embeddings`, `attention_bias`, `mlp_bias`).
    """
    has_tokenizer = vocab >= byte_tokenizer.VOCAB_SIZE
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES.get(architecture, "unknown"),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": byte_tokenizer.BOS_ID if has_tokenizer else 1,
        "eos_token_id": byte_tokenizer.EOS_ID if has_tokenizer else 2,
        "torch_dtype": "float16" if quantised else str(dtype).removeprefix("torch."),
    }
    if quantised:
        config["quantization_config"] = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.5, "head_bits": 6}
    config |= config_overrides

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    stored_dtype = torch.float16 if quantised else dtype
    for index, (key, rows, columns, has_bias) in enumerate(_matrices(config)):
        if quantised:
            tensors |= random_exl2_tensors(key, columns, rows, generator, layout=GROUP_LAYOUTS[index % 4])
        else:
            tensors[f"{key}.weight"] = _normal((rows, columns), WEIGHT_STD, generator).to(stored_dtype)
        if has_bias:
            width = _padded(rows) if quantised else rows
            tensors[f"{key}.bias"] = _normal((width,), 0.2, generator).to(stored_dtype)
    for key in _norms(layers):
        tensors[key] = (1 + _normal((hidden,), 0.2, generator)).to(stored_dtype)
    tensors["model.embed_tokens.weight"] = _normal((vocab, hidden), WEIGHT_STD, generator).to(stored_dtype)
    if config["tie_word_embeddings"] and not quantised:
        del tensors["lm_head.weight"]

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(tensors, path / ("output.safetensors" if quantised else "model.safetensors"))
    if has_tokenizer:
        byte_tokenizer.write_byte_tokenizer(path)
    return path


def random_exl2_tensors(
    key: str,
    in_features: int,
    out_features: int,
    generator: torch.Generator,
    *,
    layout: tuple[tuple[int, int], ...] = GROUP_LAYOUTS[0],
) -> dict[str, Tensor]:
    """The EXL2 tensors of one random matrix whose weights spread about as N(0, WEIGHT_STD), inputs permuted.

    `in_features` must be a multiple of 32. Columns beyond `out_features` hold random weights too, so that a reader that
    does not drop them is found out.
    """
    width = _padded(out_features)
    pairs: list[int] = []
    maxima: list[float] = []
    packed_rows, row = 0, 0
    for index in range(in_features // 32):
        if row == in_features:
            break
        bits, group_rows = layout[min(index, len(layout) - 1)]
        group_rows = min(group_rows, in_features - row)
        pairs += [bits, packed_rows]
        # Codes are uniform over 2**bits steps; the scales below average about two thirds of their maximum.
        maxima.append(WEIGHT_STD / (2**bits / 12**0.5 * 0.66))
        packed_rows += group_rows * bits // 32
        row += group_rows
    n_groups = len(maxima)
    nibbles = torch.randint(8, 16, (n_groups, width // 8, 8), generator=generator)
    shifts = torch.arange(0, 32, 4)
    return {
        f"{key}.q_weight": torch.randint(-(2**31), 2**31, (packed_rows, width), generator=generator).to(torch.int32),
        f"{key}.q_groups": torch.tensor(pairs, dtype=torch.int16),
        f"{key}.q_scale": _as_int32((nibbles << shifts).sum(dim=-1)),
        f"{key}.q_scale_max": torch.tensor(maxima, dtype=torch.float16),
        f"{key}.q_invperm": torch.randperm(in_features, generator=generator).to(torch.int32),
    }


def _matrices(config: dict[str, Any]) -> Iterator[tuple[str, int, int, bool]]:
    """(key, out features, in features, has a bias) of every matrix but the embedding."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_width = config["num_attention_heads"] * head_dim
    kv_width = config["num_key_value_heads"] * head_dim
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    qkv_bias = attention_bias or config["architectures"] == ["Qwen2ForCausalLM"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj", q_width, hidden, qkv_bias
        yield f"{prefix}.self_attn.k_proj", kv_width, hidden, qkv_bias
        yield f"{prefix}.self_attn.v_proj", kv_width, hidden, qkv_bias
        yield f"{prefix}.self_attn.o_proj", hidden, q_width, attention_bias
        yield f"{prefix}.mlp.gate_proj", intermediate, hidden, mlp_bias
        yield f"{prefix}.mlp.up_proj", intermediate, hidden, mlp_bias
        yield f"{prefix}.mlp.down_proj", hidden, intermediate, mlp_bias
    yield "lm_head", config["vocab_size"], hidden, False


def _norms(layers: int) -> Iterator[str]:
    for layer in range(layers):
        yield f"model.layers.{layer}.input_layernorm.weight"
        yield f"model.layers.{layer}.post_attention_layernorm.weight"
    yield "model.norm.weight"


def _padded(width: int) -> int:
    return -(-width // 32) * 32


def _as_int32(words: Tensor) -> Tensor:
    """Unsigned 32-bit values in int64 as the int32 with the same bits."""
    return (words - ((words >> 31) << 32)).to(torch.int32)


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * std

"""Which tensors a model must have, and a check of a checkpoint against them before anything is read.

One table of keys and sizes serves both the check and the loading, so that the two cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.layers.linear import LinearSpec, check_linear, check_shape

EMBEDDING_KEY: Final = "model.embed_tokens"
FINAL_NORM_KEY: Final = "model.norm"
HEAD_KEY: Final = "lm_head"

# Tables that old files carry along; computed from the config here.
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")


def is_ignored(name: str) -> bool:
    """Whether a tensor of this name is of no use, though files have it."""
    return _HARMLESS.search(name) is not None


def input_norm_key(layer: int) -> str:
    """The norm before attention."""
    return f"model.layers.{layer}.input_layernorm"


def mlp_norm_key(layer: int) -> str:
    """The norm before the MLP."""
    return f"model.layers.{layer}.post_attention_layernorm"


def attention_specs(config: ModelConfig, layer: int) -> dict[str, LinearSpec]:
    """The matrices of a layer's attention: q_proj, k_proj, v_proj and o_proj."""
    prefix = f"model.layers.{layer}.self_attn"
    q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "q_proj": LinearSpec(f"{prefix}.q_proj", config.hidden_size, q_width, config.qkv_bias),
        "k_proj": LinearSpec(f"{prefix}.k_proj", config.hidden_size, kv_width, config.qkv_bias),
        "v_proj": LinearSpec(f"{prefix}.v_proj", config.hidden_size, kv_width, config.qkv_bias),
        "o_proj": LinearSpec(f"{prefix}.o_proj", q_width, config.hidden_size, config.o_bias),
    }


def mlp_specs(config: ModelConfig, layer: int) -> dict[str, LinearSpec]:
    """The matrices of a layer's MLP: gate_proj, up_proj and down_proj."""
    prefix = f"model.layers.{layer}.mlp"
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    return {
        "gate_proj": LinearSpec(f"{prefix}.gate_proj", hidden, inner, bias),
        "up_proj": LinearSpec(f"{prefix}.up_proj", hidden, inner, bias),
        "down_proj": LinearSpec(f"{prefix}.down_proj", inner, hidden, bias),
    }


def adaptable(config: ModelConfig) -> Iterator[LinearSpec]:
    """Every matrix that a LoRA adapter may add to; the head also where it is the embedding's table."""
    for layer in range(config.n_layers):
        yield from attention_specs(config, layer).values()
        yield from mlp_specs(config, layer).values()
    yield LinearSpec(HEAD_KEY, config.hidden_size, config.vocab_size)


def head_spec(config: ModelConfig, checkpoint: Checkpoint) -> LinearSpec | None:
    """The output head, or None where it is the embedding: tied, and without weights of its own in the checkpoint.

    EXL2 models have a quantised head of their own even where config.json says it is tied.
    """
    if config.tied_embeddings and checkpoint.kind(HEAD_KEY) is None:
        return None
    return LinearSpec(HEAD_KEY, config.hidden_size, config.vocab_size)


def check_tensors(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Check, from the headers alone, that the checkpoint has every tensor of the model and no other.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or belongs to no part of the model.
    """
    used: set[str] = set()
    for name, shape in _plain_tensors(config):
        check_shape(checkpoint, name, shape)
        used.add(name)
    for spec in _linear_specs(config, checkpoint):
        used.update(check_linear(checkpoint, spec))
    unknown = [name for name in checkpoint.names() if name not in used and not is_ignored(name)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"the checkpoint has a tensor '{unknown[0]}'{more} that {config.architecture} with {config.n_layers} "
            "layers has no use for; the weights and config.json belong to different models"
        )


def _plain_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{EMBEDDING_KEY}.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.n_layers):
        yield f"{input_norm_key(layer)}.weight", (config.hidden_size,)
        yield f"{mlp_norm_key(layer)}.weight", (config.hidden_size,)
    yield f"{FINAL_NORM_KEY}.weight", (config.hidden_size,)


def _linear_specs(config: ModelConfig, checkpoint: Checkpoint) -> Iterator[LinearSpec]:
    for layer in range(config.n_layers):
        yield from attention_specs(config, layer).values()
        yield from mlp_specs(config, layer).values()
    head = head_spec(config, checkpoint)
    if head is not None:
        yield head

"""What the supported architectures do differently: one row each, no code per model.

All of them share the rest: RMS norm before attention and before the MLP, rotary positions in NeoX layout, causal
attention with grouped queries, a gated SiLU MLP, and the tensor names of Llama. Plain data; knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

BiasRule = Literal["never", "always", "config"]
"""Whether matrices have a bias; "config" asks `attention_bias` or `mlp_bias` of config.json."""

WindowRule = Literal["never", "all layers", "upper layers"]
"""Which layers see only the last `sliding_window` keys. "upper layers" are those from `max_window_layers` on, or what
`layer_types` says, and only where `use_sliding_window` is set."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture.

    Attributes:
        name: the string in `architectures` of config.json.
        model_type: what `model_type` must say, where it says anything.
        qkv_bias, o_bias, mlp_bias: which matrices have a bias.
        window: which layers have a sliding window.
        config_defaults: what a key that is absent from config.json means; files written as a difference from the
            defaults leave out what equals them. As transformers has it.
    """

    name: str
    model_type: str
    qkv_bias: BiasRule
    o_bias: BiasRule
    mlp_bias: BiasRule
    window: WindowRule
    config_defaults: Mapping[str, object] = field(default_factory=dict)


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    row.name: row
    for row in (
        Architecture(
            name="LlamaForCausalLM",
            model_type="llama",
            qkv_bias="config",
            o_bias="config",
            mlp_bias="config",
            window="never",
            config_defaults={"max_position_embeddings": 2048},
        ),
        Architecture(
            name="MistralForCausalLM",
            model_type="mistral",
            qkv_bias="never",
            o_bias="never",
            mlp_bias="never",
            window="all layers",
            config_defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        ),
        Architecture(
            name="Qwen2ForCausalLM",
            model_type="qwen2",
            qkv_bias="always",
            o_bias="never",
            mlp_bias="never",
            window="upper layers",
            config_defaults={
                "num_key_value_heads": 32,
                "max_position_embeddings": 32768,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
    )
}

"""LoRA folders with random matrices, and the weights that a model has with them merged in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.models import tensor_names

EMBEDDING = tensor_names.EMBEDDING_KEY
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYTHING = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Written:
    """A folder, and what its adapter adds to each [out, in] weight at scale 1."""

    path: Path
    deltas: dict[str, Tensor]
    tensors: dict[str, Tensor]


def sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of everything that can be adapted."""
    found = {spec.key: (spec.in_features, spec.out_features) for spec in tensor_names.adaptable(config)}
    return found | {EMBEDDING: (config.vocab_size, config.hidden_size)}


def write_adapter(
    path: Path,
    config: ModelConfig,
    targets: Sequence[str] = ATTENTION,
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    strength: float = 0.1,
    dtype: torch.dtype = torch.float32,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    **fields: Any,
) -> Written:
    """Write an adapter of the layers whose names end in one of `targets`; `fields` go into its config.

    `strength` is about the spread of what it adds to a weight, which the tests' models have at 0.15.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for key, (n_in, n_out) in sizes(config).items():
        name = key.rsplit(".", 1)[-1]
        if name not in targets:
            continue
        r = (ranks or {}).get(name, rank)
        scale = (alphas or {}).get(name, alpha) / (math.sqrt(r) if fields.get("use_rslora") else r)
        a = torch.randn((r, n_in), generator=generator).to(dtype)
        b = (torch.randn((n_out, r), generator=generator) * strength / (scale * math.sqrt(r))).to(dtype)
        if key == EMBEDDING:
            tensors |= {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
            deltas[key] = (b.double() @ a.double() * scale).T.float()
        else:
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            deltas[key] = (b.double() @ a.double() * scale).float()
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere",
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "rank_pattern": dict(ranks or {}),
        "alpha_pattern": dict(alphas or {}),
        "use_dora": False,
        **fields,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, path / "adapter_model.safetensors")
    return Written(path, deltas, named)

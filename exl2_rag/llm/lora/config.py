"""`adapter_config.json` of a PEFT folder: what it says about scales, and refusal of what is not honoured here.

A field that changes what is computed is either honoured or refused by its name. A field this version does not know is
refused unless it is off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl2_rag.errors import LoraError

CONFIG_FILE = "adapter_config.json"

# How the adapter was named, made or trained; not what it computes. Which modules it has, the tensor file says.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
        *("fan_in_fan_out", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "qalora_group_size", "runtime_config", "peft_type", "init_lora_weights"),
    }
)
_HONOURED = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias"})
# Why each of these is refused when it is on; the value after it counts as off, beside those that are empty or false.
_REFUSED: Mapping[str, tuple[str, object]] = {
    "use_dora": ("DoRA rescales the base weights", None),
    "bias": ("it replaces biases of the base model", "none"),
    "modules_to_save": ("it replaces whole modules of the base model", None),
    "trainable_token_indices": ("it replaces rows of the embedding", None),
    "target_parameters": ("it adapts parameters that are no linear layers", None),
    "layer_replication": ("it repeats layers of the base model", None),
    "alora_invocation_tokens": ("it is at work only after its invocation tokens", None),
    "use_qalora": ("it pools the inputs of quantised groups", None),
    "use_bdlora": ("its matrices are block-diagonal", None),
    "ensure_weight_tying": ("it adapts embedding and head together", None),
}
# These leave the base weights as they are; the others ("pissa", "olora", …) subtract something from them at the start.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The scale of each module.

    Attributes:
        rank, alpha: of modules without one of their own.
        rank_pattern, alpha_pattern: for modules whose path ends in a match of the regular expression.
        use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023).
        lora_bias: the second matrix of each module has a bias.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    lora_bias: bool = False

    @classmethod
    def from_dir(cls, path: Path) -> LoraConfig:
        """Read and check the config of a PEFT folder.

        Raises:
            LoraError: it is missing, broken, no LoRA, or asks for something this version does not do.
        """
        file = path / CONFIG_FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LoraError(
                f"{path} has no {CONFIG_FILE}; expected a folder as PEFT's save_pretrained writes it"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise LoraError(f"{file} is no readable JSON: {error}") from error
        if not isinstance(values, dict):
            raise LoraError(f"{file} must hold a JSON object, it holds a {type(values).__name__}")
        try:
            return cls._from_values(values)
        except LoraError as error:
            raise LoraError(f"{file}: {error}") from error

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> LoraConfig:
        kind = values.get("peft_type")
        if kind != "LORA":
            raise LoraError(f'peft_type must be "LORA", it is {kind!r}; other kinds of adapters are not supported')
        for name in values.keys() - _WITHOUT_EFFECT - _HONOURED:
            why, off = _REFUSED.get(name, ("this version does not know it", None))
            if values[name] and values[name] != off:
                raise LoraError(f"{name} is {values[name]!r:.60}, which is not supported: {why}")
        start = values.get("init_lora_weights", True)
        if start not in _INITIALISATIONS:
            raise LoraError(
                f"init_lora_weights is {start!r:.60}: such an adapter belongs to base weights from which its own start "
                "was subtracted; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
            )
        rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)  # PEFT's defaults
        _require(_is_rank(rank), "r", "a whole number of at least 1", rank)
        _require(_is_number(alpha), "lora_alpha", "a number", alpha)
        ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
        _check_pattern("rank_pattern", ranks, _is_rank, "whole numbers of at least 1")
        _check_pattern("alpha_pattern", alphas, _is_number, "numbers")
        for name in ("use_rslora", "lora_bias"):
            _require(isinstance(values.get(name, False), bool), name, "true or false", values.get(name))
        return cls(rank, alpha, ranks, alphas, values.get("use_rslora", False), values.get("lora_bias", False))

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its path in the model, such as "model.layers.0.self_attn.q_proj"."""
        return int(_lookup(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What the product of a module's matrices is multiplied by."""
        rank = self.rank_of(module)
        return _lookup(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _lookup(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first expression that matches the end of the path, as PEFT finds it."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_pattern(name: str, pattern: Any, is_valid: Any, expected: str) -> None:
    holds = isinstance(pattern, dict) and all(is_valid(value) for value in pattern.values())
    _require(holds, name, f"an object of {expected} by module", pattern)
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise LoraError(f"{name} has the key {key!r:.60}, which is no regular expression: {error}") from error


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise LoraError(f"{name} must be {expected}, it is {got!r:.60}")

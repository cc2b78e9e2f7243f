"""Turns a float model directory into an EXL2 one by rounding: quick, no calibration data, any machine.

The projections of attention and MLP and the output head are quantised; embedding and norms stay float16. A tied head
is quantised by itself, as the format wants it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exl2_rag.errors import CheckpointError, SettingsError, UnsupportedModelError
from exl2_rag.llm.checkpoint.checkpoint import Checkpoint
from exl2_rag.llm.checkpoint.writer import write_checkpoint
from exl2_rag.llm.quantize.candidates import HEAD_PLANS
from exl2_rag.llm.quantize.model_files import copy_files, read_source_config, write_config
from exl2_rag.llm.quantize.rtn import QuantisationPlan, padded, plan_for_bits, quantize_linear_rtn

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Models whose linear layers go by the names below."""

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_KEPT = re.compile(r"model\.(embed_tokens|norm|layers\.\d+\.(input_layernorm|post_attention_layernorm))\.weight")
_DROPPED = re.compile(r".*\.rotary_emb\.inv_freq")  # a buffer of old files; it follows from the config
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion produced.

    Attributes:
        bits_per_weight: attained average over the decoder's linear layers, tables included, head excluded.
        n_linears: quantised matrices, the head included.
        n_bytes: of the tensor files.
    """

    target_dir: Path
    bits_per_weight: float
    n_linears: int
    n_bytes: int


def convert_rtn(
    source_dir: Path,
    target_dir: Path,
    *,
    bits: float = 4.0,
    head_bits: int = 6,
    shard_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write an EXL2 copy of a float16, bfloat16 or float32 model.

    Args:
        source_dir: config.json, safetensors and tokenizer files. Not modified.
        target_dir: where the copy goes; must hold no safetensors yet. config.json appears last.
        bits: average bits per weight of the decoder's linear layers on disk, scales and tables included; 4.25 is
            about plain 4-bit codes on wide layers.
        head_bits: 2, 3, 4, 5, 6 or 8; the head is not part of the average.
        shard_bytes: see `write_checkpoint`.
        progress: called with (matrices done, matrices in all).

    Raises:
        SettingsError: bits that cannot be had.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: the source is not a float model we know.
    """
    if head_bits not in HEAD_PLANS:
        raise SettingsError(f"head_bits must be one of {sorted(HEAD_PLANS)}, it is {head_bits}")
    if not math.isfinite(bits) or bits <= 0:
        raise SettingsError(f"bits must be a positive number, it is {bits}")
    config = _read_config(source_dir)
    source = Checkpoint.open(source_dir)
    linears, kept = _sort_names(source)
    head_name = _head_name(source, config)
    writer = _TensorSet(source, total=len(linears) + 1, progress=progress)
    elements_left = sum(source.shape(f"{key}.weight")[1] * padded(source.shape(f"{key}.weight")[0]) for key in linears)
    budget_left = math.floor(bits * elements_left)
    elements, spent = elements_left, 0
    for name in kept:
        if name == _EMBEDDING:
            writer.keep(name)
    for key in linears:
        # What one matrix leaves of its share goes to those after it.
        out_features, in_features = source.shape(f"{key}.weight")
        plan = plan_for_bits(budget_left / elements_left, in_features, out_features)
        used = plan.total_bits(in_features, padded(out_features))
        writer.quantise(key, f"{key}.weight", plan)
        spent, budget_left = spent + used, budget_left - used
        elements_left -= in_features * padded(out_features)
    for name in kept:
        if name != _EMBEDDING:
            writer.keep(name)
    writer.quantise(_HEAD, head_name, HEAD_PLANS[head_bits])
    paths = write_checkpoint(target_dir, writer.tensors, shard_bytes=shard_bytes)
    copy_files(source_dir, target_dir)
    calibration = {"rows": 0, "length": 0, "dataset": "(none: round to nearest)"}
    write_config(config, target_dir, bits=bits, head_bits=head_bits, calibration=calibration)
    return ConversionReport(
        target_dir=target_dir,
        bits_per_weight=spent / elements,
        n_linears=len(linears) + 1,
        n_bytes=sum(path.stat().st_size for path in paths),
    )


class _TensorSet:
    """The tensors of the new model, as they come."""

    def __init__(self, source: Checkpoint, *, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._source = source
        self._done, self._total, self._progress = 0, total, progress

    def keep(self, name: str) -> None:
        """Take a tensor over as float16."""
        self.tensors[name] = self._source.tensor(name).to(torch.float16)

    def quantise(self, key: str, weight_name: str, plan: QuantisationPlan) -> None:
        """Quantise a matrix and the bias beside it."""
        bias_name = f"{key}.bias"
        parts = quantize_linear_rtn(
            self._source.tensor(weight_name),
            bits=plan.bits,
            group_size=plan.group_sizes,
            proportions=plan.proportions,
            bias=self._source.tensor(bias_name) if self._source.has(bias_name) else None,
        )
        self.tensors.update({f"{key}.{part}": tensor for part, tensor in parts.items()})
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _read_config(source_dir: Path) -> dict[str, Any]:
    config = read_source_config(source_dir)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{source_dir} names the architectures {architectures}; conversion knows {', '.join(ARCHITECTURES)}"
        )
    return config


def _sort_names(source: Checkpoint) -> tuple[list[str], list[str]]:
    """Keys of the linear layers in model order, and names of tensors that stay."""
    linears: list[str] = []
    kept: list[str] = []
    for name in source.names():
        key, _, part = name.rpartition(".")
        if _LINEAR.fullmatch(key) and part in ("weight", "bias"):
            if part == "weight":
                linears.append(key)
        elif _KEPT.fullmatch(name):
            kept.append(name)
        elif key != _HEAD and not _DROPPED.fullmatch(name):
            raise CheckpointError(
                f"{source.directory} has a tensor '{name}' that conversion does not know; it would be lost"
            )
    if not linears or _EMBEDDING not in kept:
        raise CheckpointError(f"{source.directory} lacks '{_EMBEDDING}' or has no linear layers; it is incomplete")
    return sorted(linears, key=_model_order), sorted(kept, key=_model_order)


def _model_order(name: str) -> tuple[int, str]:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return (int(found.group(1)) if found else -1, name)


def _head_name(source: Checkpoint, config: dict[str, Any]) -> str:
    if source.has(f"{_HEAD}.weight"):
        return f"{_HEAD}.weight"
    if config.get("tie_word_embeddings") is True:
        return _EMBEDDING
    raise CheckpointError(
        f"{source.directory} has no {_HEAD}.weight and its config does not tie it to the embedding; it is incomplete"
    )

"""What a model directory holds and what will fit: plain data, for the command line to print.

Reads headers, group tables and config.json; no weights. A model that the engine refuses is described all the same, with
the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2_rag.errors import ModelError, ModelNotFoundError
from exl2_rag.llm.checkpoint.checkpoint import Checkpoint, LayerSize
from exl2_rag.llm.config import ModelConfig

GIB = 1 << 30
CARD_GIB = (8, 12, 16, 24, 48, 80)
"""Memory of common graphics cards."""

_CACHE_DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_WORKSPACE_BYTES = GIB // 2  # activations, logits and the libraries themselves
_LAYER_ROLE = re.compile(r"model\.layers\.\d+\.(.+)")
_EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True, slots=True)
class RoleReport:
    """All matrices of one role, such as "mlp.down_proj" of every layer.

    Attributes:
        kinds: how they are stored: "exl2", "gptq", "dense".
        n_parameters: padded columns included, as they are stored.
        widths: for EXL2, (bits, share of the rows) of each width.
    """

    role: str
    kinds: tuple[str, ...]
    n_matrices: int
    n_parameters: int
    n_bytes: int
    widths: tuple[tuple[int, float], ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, tables included."""
        return self.n_bytes * 8 / self.n_parameters


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """What a device of some memory holds beside the weights.

    Attributes:
        device: "this machine", or such as "24 GiB card".
        cache_tokens: tokens of KV cache in fp16; 0 if not even the weights fit.
        sequences: how many sequences of the model's full length those are.
    """

    device: str
    memory_bytes: int
    cache_tokens: int
    sequences: float


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A model directory.

    Attributes:
        architecture: as config.json names it.
        problem: why the engine refuses this model, or None.
        requested_bits, requested_head_bits: what the converter was asked for, where the config says.
        weight_bytes: of all tensors, which is also about what they take in memory.
        bits_per_weight: average over the matrices of the decoder layers, tables included.
        roles: matrices by role, in model order; the last one is "other" for what is no matrix.
        config: None if the engine refuses the model.
        kv_bytes_per_token: by cache dtype; empty without config.
    """

    model_dir: Path
    architecture: str
    problem: str | None
    requested_bits: float | None
    requested_head_bits: float | None
    n_files: int
    weight_bytes: int
    n_parameters: int
    bits_per_weight: float | None
    roles: tuple[RoleReport, ...]
    config: ModelConfig | None
    kv_bytes_per_token: Mapping[str, int]
    fits: tuple[MemoryFit, ...]


def inspect_model(model_dir: Path) -> ModelReport:
    """Describe a model directory.

    Raises:
        ModelNotFoundError: no directory, no config.json or no tensors.
        CheckpointError: a tensor file is damaged.
    """
    raw = _read_config(model_dir)
    checkpoint = Checkpoint.open(model_dir)
    config: ModelConfig | None = None
    problem: str | None = None
    try:
        config = ModelConfig.from_dir(model_dir)
    except ModelError as error:
        problem = str(error)
    sizes = checkpoint.layer_sizes()
    roles = _roles(checkpoint, sizes)
    decoder = [role for role in roles if role.role not in ("embedding", "lm_head", "other")]
    weight_bytes = checkpoint.total_bytes()
    kv_bytes = _kv_bytes_per_token(config)
    quantisation = raw.get("quantization_config")
    request = quantisation if isinstance(quantisation, dict) else {}
    return ModelReport(
        model_dir=model_dir,
        architecture=_architecture(raw),
        problem=problem,
        requested_bits=_number(request.get("bits")),
        requested_head_bits=_number(request.get("head_bits")),
        n_files=len(list(model_dir.glob("*.safetensors"))),
        weight_bytes=weight_bytes,
        n_parameters=sum(role.n_parameters for role in roles),
        bits_per_weight=(
            sum(role.n_bytes for role in decoder) * 8 / sum(role.n_parameters for role in decoder) if decoder else None
        ),
        roles=roles,
        config=config,
        kv_bytes_per_token=kv_bytes,
        fits=_fits(weight_bytes, config, kv_bytes),
    )


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}; expected the directory of a model") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} must hold a JSON object, it holds a {type(raw).__name__}")
    return raw


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    return ", ".join(map(str, names)) if isinstance(names, list) and names else "(not named)"


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _role_of(key: str) -> str:
    if key == _EMBEDDING:
        return "embedding"
    found = _LAYER_ROLE.fullmatch(key)
    return found.group(1) if found else key


def _roles(checkpoint: Checkpoint, sizes: Mapping[str, LayerSize]) -> tuple[RoleReport, ...]:
    by_role: dict[str, list[LayerSize]] = {}
    for key, size in sizes.items():
        by_role.setdefault(_role_of(key), []).append(size)
    roles = [_role_report(role, members) for role, members in by_role.items()]
    in_matrices = sum(size.n_bytes for size in sizes.values())
    others = [name for name in checkpoint.names() if not any(name.startswith(f"{key}.") for key in sizes)]
    if others:
        n_parameters = sum(_count(checkpoint.shape(name)) for name in others)
        n_bytes = checkpoint.total_bytes() - in_matrices
        roles.append(RoleReport("other", ("dense",), len(others), n_parameters, n_bytes, ()))
    order = {"embedding": 0, "lm_head": 2, "other": 3}
    return tuple(sorted(roles, key=lambda role: order.get(role.role, 1)))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _role_report(role: str, members: list[LayerSize]) -> RoleReport:
    rows: dict[int, int] = {}
    for size in members:
        for bits, count in size.widths:
            rows[bits] = rows.get(bits, 0) + count
    total = sum(rows.values())
    return RoleReport(
        role=role,
        kinds=tuple(sorted({size.kind for size in members})),
        n_matrices=len(members),
        n_parameters=sum(size.in_features * size.out_features for size in members),
        n_bytes=sum(size.n_bytes for size in members),
        widths=tuple((bits, rows[bits] / total) for bits in sorted(rows, reverse=True)),
    )


def _kv_bytes_per_token(config: ModelConfig | None) -> dict[str, int]:
    if config is None:
        return {}
    numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return {name: numbers * size for name, size in _CACHE_DTYPE_BYTES.items()}


def _fits(weight_bytes: int, config: ModelConfig | None, kv_bytes: Mapping[str, int]) -> tuple[MemoryFit, ...]:
    if config is None:
        return ()
    devices = [(f"{gib} GiB card", gib * GIB) for gib in CARD_GIB]
    own = _machine_memory_bytes()
    if own is not None:
        devices.insert(0, ("this machine", own))
    fits: list[MemoryFit] = []
    for device, memory in devices:
        tokens = max(0, memory - weight_bytes - _WORKSPACE_BYTES) // kv_bytes["fp16"]
        fits.append(MemoryFit(device, memory, tokens, tokens / config.max_seq_len))
    return tuple(fits)


def _machine_memory_bytes() -> int | None:
    """Memory that programs can have now, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] * 1024 if kib else None

"""All tensors of a model directory, by name, whatever files they lie in. Knows nothing of architectures.

Every `*.safetensors` of the directory is read by its own header; `model.safetensors.index.json` is ignored, because
converted models carry the stale one of their source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from exl2_rag.errors import CheckpointError, ModelNotFoundError
from exl2_rag.llm.checkpoint import exl2_format, gptq_format
from exl2_rag.llm.checkpoint.safetensors_file import StoredTensor, read_header

LayerKind = Literal["exl2", "gptq", "dense"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MARKERS: tuple[tuple[str, LayerKind], ...] = ((".q_weight", "exl2"), (".qweight", "gptq"), (".weight", "dense"))
_PARTS: dict[LayerKind, tuple[str, ...]] = {
    "exl2": exl2_format.PARTS,
    "gptq": (*gptq_format.PARTS, "g_idx"),
    "dense": ("weight",),
}


@dataclass(frozen=True, slots=True)
class LayerSize:
    """What one matrix takes on disk.

    Attributes:
        widths: (bits, rows) for EXL2, one entry per width; empty for the others.
        n_bytes: all its tensors together, bias included.
    """

    kind: LayerKind
    in_features: int
    out_features: int
    widths: tuple[tuple[int, int], ...]
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, scales and tables included."""
        return self.n_bytes * 8 / (self.in_features * self.out_features)


class Checkpoint:
    """The tensors of a model, read when asked for. Holds no file open."""

    def __init__(self, directory: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.directory = directory
        self._tensors = dict(tensors)

    @classmethod
    def open(cls, model_dir: Path) -> Checkpoint:
        """Read and check the headers of all tensor files of a directory.

        Raises:
            ModelNotFoundError: no directory, or no `*.safetensors` in it.
            CheckpointError: a file is damaged, or two files hold a tensor of one name.
        """
        if not model_dir.is_dir():
            raise ModelNotFoundError(f"there is no model directory at {model_dir}; give the path of a directory")
        paths = sorted(model_dir.glob("*.safetensors"))
        if not paths:
            raise ModelNotFoundError(
                f"{model_dir} holds no *.safetensors file; expected an EXL2, GPTQ or plain safetensors model"
            )
        tensors: dict[str, StoredTensor] = {}
        for path in paths:
            for tensor in read_header(path):
                if tensor.name in tensors:
                    raise CheckpointError(
                        f"tensor '{tensor.name}' is in both {tensors[tensor.name].path.name} and {path.name}; "
                        "a model has each tensor once: remove the file that does not belong to it"
                    )
                tensors[tensor.name] = tensor
        return cls(model_dir, tensors)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this full name."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._stored(name).shape

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored.

        Raises:
            CheckpointError: there is none of that name, or it cannot be read.
        """
        return self._stored(name).read()

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.directory} has no tensor '{name}'; the model is incomplete, or of another architecture"
            ) from None

    def kind(self, key: str) -> LayerKind | None:
        """How the layer `key` is stored: "exl2", "gptq", "dense", or None if it is not there."""
        for suffix, kind in _MARKERS:
            if key + suffix in self._tensors:
                return kind
        return None

    def linear(self, key: str) -> dict[str, Tensor]:
        """The tensors of one linear layer under their short names (`q_weight`, …, `bias`), checked.

        Raises:
            CheckpointError: there is no such layer, or its tensors contradict each other.
        """
        kind = self.kind(key)
        if kind is None:
            raise CheckpointError(
                f"{self.directory} has no layer '{key}': expected {key}.q_weight, {key}.qweight or {key}.weight"
            )
        names = [name for name in (*_PARTS[kind], "bias") if f"{key}.{name}" in self._tensors]
        parts = {name: self.tensor(f"{key}.{name}") for name in names}
        if kind == "exl2":
            exl2_format.check(parts, key)
            out_features = parts["q_weight"].shape[1]
        elif kind == "gptq":
            gptq_format.check(parts, key)
            out_features = parts["qweight"].shape[1]
        else:
            _check_dense(parts["weight"], key)
            out_features = parts["weight"].shape[0]
        if "bias" in parts and (parts["bias"].dtype not in _FLOATS or parts["bias"].shape != (out_features,)):
            raise CheckpointError(
                f"{key}.bias must be floating point [{out_features}], "
                f"it is {parts['bias'].dtype} of shape {list(parts['bias'].shape)}"
            )
        return parts

    def layer_sizes(self) -> dict[str, LayerSize]:
        """What every matrix takes, by layer key: quantised layers, and plain `.weight` tensors of two dimensions."""
        sizes: dict[str, LayerSize] = {}
        for name in self.names():
            for suffix, kind in _MARKERS:
                if name.endswith(suffix) and self.kind(name.removesuffix(suffix)) == kind:
                    key = name.removesuffix(suffix)
                    if len(self.shape(name)) == 2 and 0 not in self.shape(name):
                        sizes[key] = self._layer_size(key, kind)
        return sizes

    def _layer_size(self, key: str, kind: LayerKind) -> LayerSize:
        parts = [f"{key}.{part}" for part in (*_PARTS[kind], "bias")]
        n_bytes = sum(self._tensors[part].n_bytes for part in parts if part in self._tensors)
        if kind == "exl2":
            groups = exl2_format.check({part: self.tensor(f"{key}.{part}") for part in exl2_format.PARTS}, key)
            rows: dict[int, int] = {}
            for group in groups:
                rows[group.bits] = rows.get(group.bits, 0) + group.rows
            return LayerSize(kind, sum(rows.values()), self.shape(f"{key}.q_weight")[1], tuple(rows.items()), n_bytes)
        if kind == "gptq":
            packed_rows, out_features = self.shape(f"{key}.qweight")
            return LayerSize(kind, packed_rows * 8, out_features, (), n_bytes)
        out_features, in_features = self.shape(f"{key}.weight")
        return LayerSize(kind, in_features, out_features, (), n_bytes)

    def total_bytes(self, names: Sequence[str] | None = None) -> int:
        """Bytes of the named tensors, or of all."""
        return sum(self._stored(name).n_bytes for name in (self._tensors if names is None else names))


def _check_dense(weight: Tensor, key: str) -> None:
    if weight.dtype not in _FLOATS or weight.dim() != 2:
        raise CheckpointError(
            f"{key}.weight must be float16, bfloat16 or float32 with 2 dimensions, "
            f"it is {weight.dtype} of shape {list(weight.shape)}"
        )

"""One adapter: the matrices of a PEFT folder, checked against the model they are for.

Tensors of `adapter_model.safetensors`, R the rank, K x N the layer:

    base_model.model.<layer>.lora_A.weight             [R, K]
    base_model.model.<layer>.lora_B.weight             [N, R]
    base_model.model.<layer>.lora_B.bias               [N]          with lora_bias
    base_model.model.model.embed_tokens.lora_embedding_A   [R, V]
    base_model.model.model.embed_tokens.lora_embedding_B   [N, R]
    base_model.model.<embedding or head>.base_layer.weight          a copy of the base model's table: only checked
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exl2_rag.errors import LoraError
from exl2_rag.llm.checkpoint.safetensors_file import StoredTensor, read_header
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.layers.lora import LoraMatrices
from exl2_rag.llm.lora.config import LoraConfig
from exl2_rag.llm.models import tensor_names

TENSOR_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
# Kind of a tensor by the end of its name; older files have the adapter's name before the last part.
_KINDS: Mapping[str, str] = {
    **{f".lora_A{name}.weight": "a" for name in ("", ".default")},
    **{f".lora_B{name}.weight": "b" for name in ("", ".default")},
    **{f".lora_B{name}.bias": "bias" for name in ("", ".default")},
    **{f".lora_embedding_A{name}": "embedding_a" for name in ("", ".default")},
    **{f".lora_embedding_B{name}": "embedding_b" for name in ("", ".default")},
    ".base_layer.weight": "base",
}


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A loaded adapter.

    Attributes:
        path: its folder.
        digest: hash of everything it computes with; two adapters of one digest are the same.
        modules: its matrices by the key of their layer.
    """

    path: Path
    digest: str
    modules: Mapping[str, LoraMatrices]

    @property
    def size_bytes(self) -> int:
        """Bytes of memory held."""
        return sum(one.nbytes for one in self.modules.values())


def load_adapter(path: Path, config: ModelConfig, device: torch.device) -> LoraAdapter:
    """Read a PEFT folder for a model.

    Raises:
        LoraError: it is no LoRA, not for this model, or asks for something this version does not do.
        CheckpointError: the tensor file is damaged.
    """
    if not path.is_dir():
        raise LoraError(f"there is no folder at {path}; give the folder that PEFT's save_pretrained wrote")
    settings = LoraConfig.from_dir(path)
    file = path / TENSOR_FILE
    if not file.is_file():
        if (path / _PICKLE_FILE).is_file():
            raise LoraError(
                f"{path} has only {_PICKLE_FILE}, a pickle, which can run any program when it is read; "
                f"write it again as {TENSOR_FILE} (PEFT: save_pretrained with safe_serialization=True)"
            )
        raise LoraError(f"{path} has no {TENSOR_FILE}")
    try:
        modules = _Reader(settings, config, device).read(file)
    except LoraError as error:
        raise LoraError(f"{file}: {error}") from error
    return LoraAdapter(path, _digest(modules), modules)


class _Reader:
    """Makes the modules of one file."""

    def __init__(self, settings: LoraConfig, config: ModelConfig, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._sizes = {spec.key: (spec.in_features, spec.out_features) for spec in tensor_names.adaptable(config)}
        self._embedding = (config.vocab_size, config.hidden_size)

    def read(self, file: Path) -> dict[str, LoraMatrices]:
        parts: dict[str, dict[str, StoredTensor]] = {}
        for tensor in read_header(file):
            module, kind = _split(tensor.name)
            if kind in parts.setdefault(module, {}):
                raise LoraError(f"module '{module}' has two tensors for {kind}; the second is '{tensor.name}'")
            parts[module][kind] = tensor
        modules = {}
        for module, tensors in sorted(parts.items()):
            self._check_base(module, tensors.pop("base", None))
            if tensors:
                modules[module] = self._module(module, tensors)
        if not modules:
            raise LoraError("the file has no LoRA matrices")
        return modules

    def _check_base(self, module: str, tensor: StoredTensor | None) -> None:
        """A copy of the embedding or head, which PEFT saves beside an adapter of it; frozen while it was trained."""
        if tensor is None:
            return
        if module not in (tensor_names.EMBEDDING_KEY, tensor_names.HEAD_KEY):
            raise LoraError(f"tensor '{tensor.name}' replaces base weights, which is not supported")
        _check(tensor, self._embedding)

    def _module(self, module: str, tensors: Mapping[str, StoredTensor]) -> LoraMatrices:
        is_embedding = module == tensor_names.EMBEDDING_KEY
        if not is_embedding and module not in self._sizes:
            raise LoraError(
                f"the model has no linear layer '{module}' to adapt; the adapter belongs to another model, or adapts "
                "something that is not supported"
            )
        n_in, n_out = self._embedding if is_embedding else self._sizes[module]
        rank = self._settings.rank_of(module)
        names = ("embedding_a", "embedding_b") if is_embedding else ("a", "b")
        wanted: dict[str, tuple[int, ...]] = {names[0]: (rank, n_in), names[1]: (n_out, rank)}
        if self._settings.lora_bias and not is_embedding:
            wanted["bias"] = (n_out,)
        for kind in wanted:
            if kind not in tensors:
                raise LoraError(f"module '{module}' has no tensor for {kind}; the file is incomplete")
        for kind, tensor in tensors.items():
            if kind not in wanted:
                raise LoraError(f"tensor '{tensor.name}' has no place in module '{module}' by {wanted.keys()}")
            _check(tensor, wanted[kind])
        read = {kind: tensors[kind].read().to(self._device) for kind in wanted}
        a = read[names[0]].T if is_embedding else read[names[0]]  # rows of the embedding are looked up by token
        bias = read["bias"].to(torch.float32) if "bias" in read else None
        return LoraMatrices(a.contiguous(), read[names[1]].contiguous(), bias, self._settings.scale_of(module))


def _split(name: str) -> tuple[str, str]:
    """The module and the kind of a tensor."""
    kind = next((suffix for suffix in _KINDS if name.endswith(suffix)), None)
    if kind is None or not name.startswith(_PREFIX):
        raise LoraError(
            f"tensor '{name}' is not supported; expected {_PREFIX}<layer>.lora_A.weight, .lora_B.weight and their like"
        )
    return name.removeprefix(_PREFIX).removesuffix(kind), _KINDS[kind]


def _check(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise LoraError(
            f"tensor '{tensor.name}' must have shape {list(shape)} by the model and the adapter's rank, it has "
            f"{list(tensor.shape)}; the adapter belongs to another model"
        )
    if tensor.dtype not in ("F32", "F16", "BF16"):
        raise LoraError(f"tensor '{tensor.name}' must be float32, float16 or bfloat16, it is {tensor.dtype}")


def _digest(modules: Mapping[str, LoraMatrices]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key, one in sorted(modules.items()):
        digest.update(f"{key} {one.scale!r} {one.bias is not None}".encode())
        for tensor in (one.a, one.b, one.bias):
            if tensor is not None:
                digest.update(f" {list(tensor.shape)} {tensor.dtype} ".encode())
                digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.cpu().contiguous().view(torch.uint8).numpy().data
    return data

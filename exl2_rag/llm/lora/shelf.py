"""The adapters of an engine by name. Safe from any thread.

A request takes its adapters when it is made and keeps them to its end, so unloading one only takes it off the shelf:
requests in progress go on with it, later ones do not find it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from exl2_rag.errors import LoraError, RequestError
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.lora.adapter import LoraAdapter, load_adapter
from exl2_rag.llm.lora.choice import LoraChoices

LoraSet = tuple[tuple[LoraAdapter, float], ...]
"""Adapters at work together with their scales, in the order of their digests; each digest once, no scale 0."""


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """A loaded adapter, as its user sees it.

    Attributes:
        digest: hash of its matrices and scales; it is part of what cached pages are found by.
        modules: the layers it adapts.
        size_bytes: memory held.
    """

    name: str
    path: Path
    digest: str
    modules: tuple[str, ...]
    size_bytes: int


class LoraShelf:
    """Loads adapters for one model.

    Args:
        config: the model.
        device: where its matrices are.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._lock = threading.Lock()
        self._adapters: dict[str, LoraAdapter] = {}

    def load(self, path: Path, name: str | None = None) -> LoraInfo:
        """Read a PEFT folder; without a name it gets that of the folder.

        Raises:
            LoraError: the folder cannot be used, or the name is taken by another adapter.
            CheckpointError: its tensor file is damaged.
        """
        if self._device.type != "cpu":
            raise LoraError('LoRA adapters run on the CPU only in this version; open the model with device="cpu"')
        name = path.resolve().name if name is None else name
        if not name:
            raise LoraError("the name of a LoRA adapter must not be empty")
        adapter = load_adapter(path, self._config, self._device)
        with self._lock:
            known = self._adapters.get(name)
            if known is not None and known.digest != adapter.digest:
                raise LoraError(
                    f"there is a LoRA adapter '{name}' already, from {known.path}; unload it, or give another name"
                )
            adapter = self._adapters.setdefault(name, adapter)
        return _info(name, adapter)

    def unload(self, name: str) -> None:
        """Take an adapter off the shelf; its memory is free once no request uses it.

        Raises:
            RequestError: there is none of that name.
        """
        with self._lock:
            self._get(name)
            del self._adapters[name]

    def infos(self) -> tuple[LoraInfo, ...]:
        """The loaded adapters, in the order of loading."""
        with self._lock:
            return tuple(_info(name, adapter) for name, adapter in self._adapters.items())

    def resolve(self, choices: LoraChoices) -> LoraSet:
        """The adapters of a request.

        Raises:
            RequestError: there is none of a name.
        """
        found: dict[str, tuple[LoraAdapter, float]] = {}
        with self._lock:
            for name, scale in choices:
                adapter = self._get(name)
                earlier = found[adapter.digest][1] if adapter.digest in found else 0.0
                found[adapter.digest] = (adapter, earlier + scale)
        return tuple(one for _, one in sorted(found.items()) if one[1] != 0)

    def _get(self, name: str) -> LoraAdapter:
        try:
            return self._adapters[name]
        except KeyError:
            loaded = ", ".join(f"'{one}'" for one in self._adapters) or "none"
            raise RequestError(f"there is no LoRA adapter '{name}'; loaded are: {loaded} (see load_lora)") from None


def _info(name: str, adapter: LoraAdapter) -> LoraInfo:
    return LoraInfo(name, adapter.path, adapter.digest, tuple(adapter.modules), adapter.size_bytes)

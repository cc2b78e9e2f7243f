"""Writes a model's tensors as they come, holding no more than one file's worth of them in memory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors.torch import save_file
from torch import Tensor

from exl2_rag.errors import CheckpointError

DEFAULT_SHARD_BYTES = 512 << 20


class ShardWriter:
    """Fills numbered safetensors files in a directory; use it as a context.

    The files get their names when the context ends well, all at once; when it ends by an error nothing stays.

    Args:
        directory: made if absent; must not hold safetensors files yet, since a model is all those in its directory.
        shard_bytes: a file is written before it would exceed this; a larger tensor has a file to itself.

    Raises:
        CheckpointError: the directory holds a model already.
    """

    def __init__(self, directory: Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        if shard_bytes <= 0:
            raise CheckpointError(f"ShardWriter: shard_bytes must be positive, it is {shard_bytes}")
        directory.mkdir(parents=True, exist_ok=True)
        present = sorted(path.name for path in directory.glob("*.safetensors"))
        if present:
            raise CheckpointError(f"{directory} holds {', '.join(present)} already; give an empty directory")
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._names: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._partial: list[Path] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, which must not change until the file is written.

        Raises:
            CheckpointError: the name came already.
        """
        if name in self._names:
            raise CheckpointError(f"ShardWriter: there are two tensors named '{name}'")
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._names.add(name)
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
                self._name_files()
        finally:
            for path in self._partial:
                path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending:
            raise CheckpointError("ShardWriter: there are no tensors to write")
        path = self._directory / f"output-{len(self._partial) + 1:05}.safetensors.partial"
        self._partial.append(path)
        save_file(self._pending, path)
        self._pending = {}
        self._pending_bytes = 0

    def _name_files(self) -> None:
        total = len(self._partial)
        for index, path in enumerate(self._partial):
            name = "output.safetensors" if total == 1 else f"output-{index + 1:05}-of-{total:05}.safetensors"
            path.rename(self._directory / name)

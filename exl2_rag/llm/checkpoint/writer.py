"""Writes tensors as safetensors files the way EXL2 models have them: one `output.safetensors`, or numbered shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from exl2_rag.errors import CheckpointError


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int | None = None) -> list[Path]:
    """Write tensors in the order given; a file appears under its name only when all of them are complete.

    Args:
        directory: made if absent; must not hold safetensors files yet, since a model is all those in its directory.
        tensors: by full name. Not modified.
        shard_bytes: start a new file before this many bytes of tensors; a larger tensor has a file to itself. None:
            one file.

    Returns:
        The files written.

    Raises:
        CheckpointError: nothing to write, or the directory holds a model already.
    """
    if not tensors:
        raise CheckpointError("write_checkpoint: there are no tensors to write")
    if shard_bytes is not None and shard_bytes <= 0:
        raise CheckpointError(f"write_checkpoint: shard_bytes must be positive, it is {shard_bytes}")
    directory.mkdir(parents=True, exist_ok=True)
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if present:
        raise CheckpointError(f"{directory} holds {', '.join(present)} already; give an empty directory")
    shards = _plan(tensors, shard_bytes)
    names = ["output.safetensors"]
    if len(shards) > 1:
        names = [f"output-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
    partial = [directory / f"{name}.partial" for name in names]
    try:
        for path, shard in zip(partial, shards, strict=True):
            # Clones: the library refuses tensors that share memory, as tied or sliced ones do.
            save_file({name: tensors[name].detach().clone().contiguous() for name in shard}, path)
        for path, name in zip(partial, names, strict=True):
            path.rename(directory / name)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return [directory / name for name in names]


def _plan(tensors: Mapping[str, Tensor], shard_bytes: int | None) -> list[list[str]]:
    """Tensor names per file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and shard_bytes is not None and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards

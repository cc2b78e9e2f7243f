"""One safetensors file: its header, checked as untrusted input, and its tensors.

    8 bytes   n, little-endian
    n bytes   JSON: {"name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
    the rest  the tensors' bytes; together they cover it without gaps

Own code rather than the safetensors library, so that every fault has its own message and nothing is mapped into
memory before it is known to be sound. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from exl2_rag.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_DIMENSIONS = 16

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()} | {
    # Types that may stand in a file beside what we read.
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "C64": 8,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `start` counts from the beginning of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int

    def read(self) -> Tensor:
        """The tensor as stored, in memory of its own.

        Raises:
            CheckpointError: an element type we do not read, or the file has shrunk since its header was read.
        """
        dtype = _DTYPES.get(self.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path.name}: tensor '{self.name}' has elements of type {self.dtype}; "
                f"expected one of {', '.join(_DTYPES)}"
            )
        tensor = torch.empty(self.shape, dtype=dtype)
        if self.n_bytes:
            target = tensor.reshape(-1).view(torch.uint8).numpy().data
            try:
                with self.path.open("rb") as file:
                    file.seek(self.start)
                    count = file.readinto(target)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error}") from error
            if count != self.n_bytes:
                raise CheckpointError(
                    f"{self.path.name}: tensor '{self.name}' should have {self.n_bytes} bytes, {count} are left in "
                    "the file; it is truncated, fetch it again"
                )
        return tensor


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a file, without reading their data.

    Raises:
        CheckpointError: the file is no sound safetensors file; the message says why.
    """
    try:
        with path.open("rb") as file:
            text, data_start, data_bytes = _header_text(file, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: the header is not valid JSON ({error}); the file is damaged") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: the header must be a JSON object, it is a {type(header).__name__}")
    header.pop("__metadata__", None)  # free text; nothing in it is ours to judge
    tensors = [_entry(path, name, entry, data_start, data_bytes) for name, entry in header.items()]
    _check_coverage(path, tensors, data_start, data_bytes)
    return tensors


def _header_text(file: BinaryIO, path: Path) -> tuple[bytes, int, int]:
    """The header's bytes, where the data starts, and how many bytes of data there are."""
    size = path.stat().st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path.name}: a safetensors file has at least 8 bytes, this one has {size}; fetch it again"
        )
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path.name}: the header claims {header_bytes} bytes, more than the {_MAX_HEADER_BYTES} allowed; "
            "this is no safetensors file, or a damaged one"
        )
    if header_bytes > size - 8:
        raise CheckpointError(
            f"{path.name}: the header claims {header_bytes} bytes, but only {size - 8} follow; "
            "the file is truncated, fetch it again"
        )
    return file.read(header_bytes), 8 + header_bytes, size - 8 - header_bytes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"the header names '{twice}' twice; the file is damaged")
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _entry(path: Path, name: str, entry: object, data_start: int, data_bytes: int) -> StoredTensor:
    where = f"{path.name}: tensor '{name}'"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets in the header, it has {entry!r:.100}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{where} has the unknown element type {dtype!r:.50}; expected {', '.join(_ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where} must have a list of sizes as its shape, it has {shape!r:.100}")
    if math.prod(size for size in shape if size) >= 1 << 62:
        raise CheckpointError(f"{where} has the shape {shape}, more elements than can be counted")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where} must have two byte offsets, it has {offsets!r:.100}")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise CheckpointError(
            f"{where} should lie at bytes {begin} to {end}, but the file has {data_bytes} bytes of data; "
            "it is truncated or damaged, fetch it again"
        )
    n_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if n_bytes != end - begin:
        raise CheckpointError(
            f"{where} of shape {shape} and type {dtype} takes {n_bytes} bytes, its offsets span {end - begin}"
        )
    return StoredTensor(path, name, dtype, tuple(shape), data_start + begin, n_bytes)


def _check_coverage(path: Path, tensors: list[StoredTensor], data_start: int, data_bytes: int) -> None:
    """Every byte of data belongs to exactly one tensor."""
    position, last = data_start, "the start of the data"
    for tensor in sorted(tensors, key=lambda item: (item.start, item.n_bytes)):
        if tensor.start < position:
            raise CheckpointError(f"{path.name}: tensors '{last}' and '{tensor.name}' overlap; the file is damaged")
        if tensor.start > position:
            raise CheckpointError(
                f"{path.name}: {tensor.start - position} bytes between {last} and '{tensor.name}' belong to no tensor; "
                "the file is damaged"
            )
        position, last = tensor.start + tensor.n_bytes, tensor.name
    if position != data_start + data_bytes:
        raise CheckpointError(
            f"{path.name}: {data_start + data_bytes - position} bytes after '{last}' belong to no tensor; "
            "the file is damaged"
        )

"""Digests of a model's tensor files: of their headers, or of every byte.

Headers (names, shapes, offsets) tell architectures and bit widths apart, cost nothing, and are enough for a cache that
lives and dies with one loaded copy of the weights. A cache that outlives its process needs every byte: a fine-tune, or
the same model quantised with other calibration text, has the same headers; and a sample could miss a change of a few
rows, such as a new token's embedding. So all bytes are hashed, in parallel slices, once for each file: the result is
kept in the user's cache directory under the file's path, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exl2_rag.errors import CheckpointError

_SLICE_BYTES = 16 * 2**20
_THREADS = 4  # hashlib lets other threads run; more only keep a disk busier
_MAX_KEPT = 1000
_logger = logging.getLogger(__name__)


def header_digest(model_dir: Path) -> str:
    """ "headers:" and a digest of the names, sizes and headers of a directory's safetensors files.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=32)
    try:
        for path in _tensor_files(model_dir):
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                for one in (path.name.encode(), str(path.stat().st_size).encode(), file.read(min(header_bytes, 2**27))):
                    digest.update(len(one).to_bytes(8, "little"))
                    digest.update(one)
    except OSError as error:
        raise _unreadable(error) from error
    return f"headers:{digest.hexdigest()}"


def weights_digest(model_dir: Path, *, kept_in: Path | None = None) -> str:
    """ "sha256:" and a digest of every byte of a directory's safetensors files. Their names do not count.

    Args:
        kept_in: file of digests of earlier calls; None is `weights.json` in the user's cache directory.

    Raises:
        CheckpointError: a file cannot be read.
    """
    store = digest_file() if kept_in is None else kept_in
    known = _read(store)
    is_new = False
    parts: list[str] = []
    for path in _tensor_files(model_dir):
        try:
            status = path.stat()
            # The time of change of the file's entry (ctime) cannot be set back by `touch` or `cp -p`, unlike mtime.
            key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"
            if not isinstance(known.get(key), str):
                known[key] = _hash_file(path, status.st_size)
                is_new = True
        except OSError as error:
            raise _unreadable(error) from error
        parts.append(known[key])
    if is_new:
        _write(store, known)
    return f"sha256:{hashlib.sha256(' '.join(parts).encode()).hexdigest()}"


def digest_file() -> Path | None:
    """Where digests are kept: in `EXL2_RAG_CACHE`, else in the user's cache directory; None where there is no home."""
    chosen = os.environ.get("EXL2_RAG_CACHE")
    try:
        return (Path(chosen) if chosen else Path.home() / ".cache" / "exl2-rag") / "weights.json"
    except RuntimeError:
        return None


def _tensor_files(model_dir: Path) -> list[Path]:
    return sorted(model_dir.glob("*.safetensors"))


def _hash_file(path: Path, n_bytes: int) -> str:
    """Digest of the digests of the file's slices."""

    def slice_digest(start: int) -> bytes:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = min(_SLICE_BYTES, n_bytes - start)
            buffer = memoryview(bytearray(min(left, 2**20)))
            while left:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise OSError(f"{path} became shorter while it was read")
                digest.update(buffer[:count])
                left -= count
        return digest.digest()

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="weights digest") as pool:
        whole = hashlib.sha256(b"".join(pool.map(slice_digest, range(0, n_bytes, _SLICE_BYTES))))
    return whole.hexdigest()


def _read(store: Path | None) -> dict[str, str]:
    """Digests of earlier calls; none if the file is missing or damaged, as they can be computed again."""
    if store is None or not store.is_file():
        return {}
    try:
        found = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(store: Path | None, known: dict[str, str]) -> None:
    if store is None:
        return
    newest = dict(list(known.items())[-_MAX_KEPT:])
    beside = store.with_suffix(f".{os.getpid()}.tmp")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(newest), encoding="utf-8")
        beside.replace(store)
    except OSError as error:
        _logger.warning("digests of weights are not kept, they will be computed again next time: %s", error)


def _unreadable(error: OSError) -> CheckpointError:
    return CheckpointError(f"a tensor file cannot be read ({error}); check the file, or fetch the model again")

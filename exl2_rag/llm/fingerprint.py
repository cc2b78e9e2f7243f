"""What roots the page keys: everything besides the tokens that keys and values depend on.

Two caches with the same fingerprint hold the same numbers for the same tokens. It guards pages within one process; a
store that outlives the process must add a checksum of the weights themselves.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

FORMAT_VERSION = 1


def cache_fingerprint(model_dir: Path, **settings: str | int) -> bytes:
    """32 bytes that name a model and how its cache is laid out.

    Args:
        model_dir: the contents of `config.json` and the name, size and header of every safetensors file count.
        settings: what else matters (cache dtype, page size, precision, …).
    """
    digest = hashlib.blake2b(digest_size=32)
    _add(digest, b"exl2-rag kv", str(FORMAT_VERSION).encode())
    _add(digest, b"settings", json.dumps(settings, sort_keys=True).encode())
    config = model_dir / "config.json"
    _add(digest, b"config", config.read_bytes() if config.is_file() else b"")
    for path in sorted(model_dir.glob("*.safetensors")):
        _add(digest, path.name.encode(), str(path.stat().st_size).encode())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            _add(digest, b"header", file.read(min(header_bytes, 2**27)))
    return digest.digest()


def _add(digest: hashlib.blake2b, *fields: bytes) -> None:
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))  # so that no two lists of fields read the same
        digest.update(field)

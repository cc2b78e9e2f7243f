"""Fetches models from the Hugging Face hub, or one that speaks its protocol (`HF_ENDPOINT`).

huggingface_hub says what there is and where; the bytes are read here, because its own downloads begin a file anew in
every process, and a file of a model has gigabytes. A file grows as NAME.partial, is checked, and gets its name when it
is whole; `.pull.json` keeps which version of each file is there.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from exl2_rag.errors import DownloadError, SettingsError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What no part of this package reads. Other forms of the same weights would double the download.
_LEFT_OUT: Final = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "original/*", ".*")
_SPARE_BYTES: Final = 256 << 20
_PIECE_BYTES: Final = 1 << 20
_ATTEMPTS: Final = 5
_TIMEOUT_S: Final = 30.0
_RECORD: Final = ".pull.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[str, int, int], None]
"""Told (file, bytes there, bytes in all)."""


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository of the hub at a revision: branch, tag or commit; converters keep each bit rate on its own branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubModel:
        """ "owner/name" or "owner/name:revision".

        Raises:
            SettingsError: it is neither.
        """
        name, _, revision = text.partition(":")
        if not _NAME.fullmatch(name) or (":" in text and not revision):
            raise SettingsError(f"expected owner/name or owner/name:revision, got {text!r}")
        return cls(name, revision or None)

    @property
    def directory_name(self) -> str:
        """A name for its directory: of the repository, and of the revision if one is asked for."""
        name = self.repository.partition("/")[2]
        return name if self.revision is None else f"{name}-{self.revision.replace('/', '-')}"

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}:{self.revision}"


@dataclass(frozen=True, slots=True)
class _File:
    """A file to fetch: its name, where it is, how long, and what identifies its contents."""

    name: str
    url: str
    n_bytes: int
    etag: str
    headers: dict[str, str]


def fetch(
    model: HubModel, directory: Path, *, token: str | None = None, progress: Progress = lambda _name, _done, _all: None
) -> Path:
    """Download a model's files. What is there already is not fetched again; a file that broke off goes on.

    Args:
        model: repository and revision.
        directory: where the files go; made if absent.
        token: for private and gated repositories; None: what `hf auth login` or HF_TOKEN says.

    Raises:
        DownloadError: no such repository or revision, no access, no connection, no room, or no model in it.
    """
    files = _files(model, token)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        record = _read_record(directory)
        missing = [one for one in files if not _is_there(directory, one, record)]
        _check_room(directory, sum(one.n_bytes - _partial_bytes(directory, one) for one in missing))
        for one in missing:
            _fetch_file(directory, one, progress)
            record[one.name] = one.etag
            (directory / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DownloadError(
            f"{model} could not be fetched whole: {error}; the same command goes on where this one stopped"
        ) from error
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise DownloadError(
            f"{model} holds no model that can be used: expected config.json and *.safetensors; EXL2 repositories often "
            "keep each bit rate on a branch of its own, which is given as owner/name:branch"
        )
    return directory


def _files(model: HubModel, token: str | None) -> list[_File]:
    """What the repository has for us."""
    try:
        from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_url
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise DownloadError("fetching models takes huggingface_hub; install exl2-rag[hub]") from error
    try:
        info = HfApi(token=token).model_info(model.repository, revision=model.revision)
        secret = token or get_token()
        names = [one.rfilename for one in info.siblings or ()]
        files = []
        for name in names:
            if any(fnmatch(name, pattern) for pattern in _LEFT_OUT):
                continue
            url = hf_hub_url(model.repository, name, revision=info.sha)
            found = get_hf_file_metadata(url, token=token)
            # The token is for the hub alone, not for the store that it may point to.
            same_host = urlsplit(found.location).netloc == urlsplit(url).netloc
            headers = {"Authorization": f"Bearer {secret}"} if secret and same_host else {}
            files.append(_File(name, found.location, found.size or 0, found.etag or "", headers))
    except GatedRepoError as error:
        raise DownloadError(f"{model} is gated: accept its terms on the hub, then give a token (HF_TOKEN)") from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{model.repository} has no revision {model.revision!r}; look at its branches") from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"there is no repository {model.repository}, or it is private; check name and token"
        ) from error
    except Exception as error:  # whatever the client's network stack raises, which changes with its versions
        raise DownloadError(
            f"the hub cannot be asked for {model}: {error}; check the connection and try again"
        ) from error
    unsafe = next((one.name for one in files if one.name.startswith("/") or ".." in one.name.split("/")), None)
    if unsafe is not None:
        raise DownloadError(f"{model} has a file {unsafe!r}, which would lie outside of its directory; refused")
    return files


def _fetch_file(directory: Path, one: _File, progress: Progress) -> None:
    path = directory / one.name
    partial = _partial(directory, one)
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while _partial_bytes(directory, one) < one.n_bytes or not partial.is_file():
        before = _partial_bytes(directory, one)
        try:
            _append(partial, one, progress)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            # Attempts count as long as nothing comes; a slow line that breaks now and then gets there.
            failures = 0 if _partial_bytes(directory, one) > before + _PIECE_BYTES else failures + 1
            if failures >= _ATTEMPTS:
                raise OSError(f"{one.name}: {error}") from error
            time.sleep(min(2.0**failures / 10, 5.0))
    _check_contents(partial, one)
    partial.replace(path)


def _append(partial: Path, one: _File, progress: Progress) -> None:
    start = partial.stat().st_size if partial.is_file() else 0
    headers = one.headers | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(one.url, headers=headers)
    if urlsplit(one.url).scheme not in ("http", "https"):
        raise OSError(f"{one.name} is at {one.url}, which is no web address")
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        goes_on = start > 0 and response.status == http.client.PARTIAL_CONTENT
        with partial.open("ab" if goes_on else "wb") as file:
            while piece := response.read(_PIECE_BYTES):
                file.write(piece)
                progress(one.name, file.tell(), one.n_bytes)
    if partial.stat().st_size < one.n_bytes:
        raise ConnectionError(f"the connection ended after {partial.stat().st_size} of {one.n_bytes} bytes")


def _check_contents(partial: Path, one: _File) -> None:
    """Length, and of large files the hash that the hub knows them by."""
    n_bytes = partial.stat().st_size
    damaged = n_bytes != one.n_bytes
    if not damaged and _SHA256.fullmatch(one.etag):
        with partial.open("rb") as file:
            damaged = hashlib.file_digest(file, "sha256").hexdigest() != one.etag
    if damaged:
        partial.unlink()
        raise OSError(f"{one.name} came damaged ({n_bytes} bytes, expected {one.n_bytes}) and was deleted")


def _partial(directory: Path, one: _File) -> Path:
    """Named after the contents, so that what is left of another version is not continued."""
    mark = hashlib.blake2b(one.etag.encode(), digest_size=4).hexdigest()
    return directory / f"{one.name}.{mark}.partial"


def _partial_bytes(directory: Path, one: _File) -> int:
    partial = _partial(directory, one)
    return partial.stat().st_size if partial.is_file() else 0


def _is_there(directory: Path, one: _File, record: dict[str, str]) -> bool:
    path = directory / one.name
    return path.is_file() and path.stat().st_size == one.n_bytes and record.get(one.name) == one.etag


def _read_record(directory: Path) -> dict[str, str]:
    try:
        found = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # then everything is fetched anew
    return found if isinstance(found, dict) else {}


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed + _SPARE_BYTES > free:
        raise DownloadError(
            f"the files take {needed / 2**30:.1f} GiB, {directory} has room for {free / 2**30:.1f}; make room or give "
            "another directory"
        )

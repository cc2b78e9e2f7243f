"""A hub on this machine: serves repositories from memory by the protocol of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


def commit_of(revision: str) -> str:
    """The commit that a branch is at."""
    return hashlib.sha1(revision.encode()).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """Repositories: name -> revision -> file name -> contents.

    Attributes:
        gated: names of repositories that refuse everybody.
        break_after: no file gets further than so many bytes.
        damaged: what is sent is not what was announced.
        fetched: (file name, first byte) of each download.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, dict[str, bytes]]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.gated: set[str] = set()
        self.break_after: int | None = None
        self.damaged = False
        self.fetched: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running(repositories: dict[str, dict[str, dict[str, bytes]]]) -> Iterator[FakeHub]:
    hub = FakeHub(repositories)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"
    _commit = ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        words = unquote(self.path.partition("?")[0]).strip("/").split("/")
        is_api = words[:2] == ["api", "models"]
        words = words[2:] if is_api else words
        repository = "/".join(words[:2])
        if repository not in self.server.repositories:
            return self._refuse("RepoNotFound", 404)
        if repository in self.server.gated:
            return self._refuse("GatedRepo", 403)
        kind, revision = (words[2], words[3]) if len(words) > 3 else ("revision", "main")
        revisions = self.server.repositories[repository]
        branch = next((one for one in revisions if revision in (one, commit_of(one))), None)
        if branch is None:
            return self._refuse("RevisionNotFound", 404)
        files, self._commit = revisions[branch], commit_of(branch)
        if is_api and kind == "tree":
            return self._json([self._entry(name, data) for name, data in files.items()])
        if is_api:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self._json({"id": repository, "modelId": repository, "sha": self._commit, "siblings": siblings})
        name = "/".join(words[4:])
        if name not in files:
            return self._refuse("EntryNotFound", 404)
        return self._file(name, files[name], with_body=with_body)

    @staticmethod
    def _entry(name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _file(self, name: str, data: bytes, *, with_body: bool) -> None:
        asked = self.headers.get("Range", "")
        first = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self._commit)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if not with_body:
            return
        self.server.fetched.append((name, first))
        body = data[first:]
        if self.server.damaged:
            body = bytes(len(body))
        if self.server.break_after is not None and len(data) > self.server.break_after:
            # Also when the client asks for the rest at once, as it does.
            self.wfile.write(body[: max(0, self.server.break_after - first)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body)

    def _json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", self._commit)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, code: str, status: int) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

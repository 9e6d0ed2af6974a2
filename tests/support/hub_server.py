"""A stand-in for the Hugging Face Hub on loopback: the few endpoints that huggingface_hub calls to read a model."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

import pytest

from expo_ray.storage import forget_stores
from tests.support.hub_uploads import DROP, written

TOKEN, READ_TOKEN = "hf_standin", "hf_standin_read"
LARGE_BYTES = 1000  # files from this size on are in "LFS": served by a redirect to another host name


@dataclass
class Repository:
    """One model.

    Attributes:
        files: by commit, by path.
        branches: commit of each.
        private: visible only with the token.
        gated: listed for everyone, served to nobody.
    """

    files: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    private: bool = False
    gated: bool = False


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    range: str
    authorized: bool


@dataclass
class HubServer:
    """Runs while the `with` block lasts.

    Attributes:
        faults: what to do to the next requests for file contents: an HTTP status, `truncate`, `flip` or `stall`.
        api_faults: the same for requests about a model: an HTTP status or `stall`.
        expire_after: how many requests a redirected address serves before it answers 403.
        seen: every request.
        uploads: what was sent of large files, by SHA-256; not in any repository yet.
        upload_faults: statuses to answer the next requests that write with, by what they ask for, such as `commit`.
        on_upload: called before each large file is taken.
        forged: headers in the place of the true ones in every answer with contents.
        limits: requests of a kind, `api` or `resolvers`, that are answered in each window; others get 429, as the Hub documents it
            (https://huggingface.co/docs/hub/rate-limits).
        window_s: the Hub's has five minutes.
        refused: how many requests of a kind were.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[int | str] = field(default_factory=list)
    api_faults: list[int | str] = field(default_factory=list)
    expire_after: int = 1_000_000
    seen: list[Seen] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    upload_faults: dict[str, list[int | str]] = field(default_factory=dict)
    on_upload: Callable[[], None] = lambda: None
    forged: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    window_s: float = 300.0
    refused: Counter[str] = field(default_factory=Counter)

    def admits(self, kind: str) -> bool:
        """Count a request of a kind in its window of time, and say whether it is answered."""
        with self._lock:
            window = int(time.monotonic() / self.window_s)
            self._in_window[kind, window] += 1
            admitted = self._in_window[kind, window] <= self.limits.get(kind, self._in_window[kind, window])
            self.refused[kind] += not admitted
            return admitted

    def __post_init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.served: dict[str, int] = {}
        self._lock = threading.Lock()
        self._in_window: Counter[tuple[str, int]] = Counter()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            authorized = self.headers.get("authorization") == f"Bearer {TOKEN}"
            hub.seen.append(Seen(self.command, path, self.headers.get("range", ""), authorized))
            kind = "api" if path.startswith("/api/") else "resolvers" if "/resolve/" in path else ""
            if kind and not hub.admits(kind):
                left = hub.window_s - time.monotonic() % hub.window_s
                self._answer(429, {"RateLimit": f'"{kind}";r=0;t={math.ceil(left)}'})
                return
            if match := re.fullmatch(r"/cdn/([\w/-]+)/(\w{40})/(\d+)/(.*)", path):
                self._content(match[1], match[2], match[3], match[4])
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.*))?", path):
                self._api(match[1], match[2] or "main", authorized)
            elif path == "/api/whoami-v2":
                if authorized:
                    self._json({"name": "somebody", "auth": {"accessToken": {"role": "write"}}})
                elif self.headers.get("authorization") == f"Bearer {READ_TOKEN}":
                    self._json({"name": "somebody", "auth": {"accessToken": {"role": "read"}}})
                else:
                    self._answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w{40})/(.*)", path):
                self._resolve(match[1], match[2], match[3], authorized)
            else:
                self._answer(404, {})

        def do_POST(self) -> None:
            self._write()

        def do_PUT(self) -> None:
            self._write()

        def _write(self) -> None:
            path = unquote(urlsplit(self.path).path)
            authorized = self.headers.get("authorization") == f"Bearer {TOKEN}"
            hub.seen.append(Seen(self.command, path, "", authorized))
            if self.headers.get("transfer-encoding") == "chunked":
                self._answer(411, {})
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, answer = written(hub, path, body, authorized=authorized)
            if status == DROP:
                self.close_connection = True
            else:
                self._answer(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

        def _api(self, name: str, revision: str, authorized: bool) -> None:
            fault = hub.api_faults.pop(0) if hub.api_faults else None
            if fault == "stall":
                time.sleep(3)
            if isinstance(fault, int):
                self._answer(fault, {})
                return
            repository = hub.repositories.get(name)
            if repository is None or (repository.private and not authorized):
                self._answer(401, {"X-Error-Code": "RepoNotFound"})
                return
            commit = repository.branches.get(revision, revision)
            if commit not in repository.files:
                self._answer(404, {"X-Error-Code": "RevisionNotFound"})
                return
            files = [_entry(path, data) for path, data in repository.files[commit].items()]
            self._json({"id": name, "modelId": name, "sha": commit, "siblings": files, "tags": []})

        def _resolve(self, name: str, commit: str, path: str, authorized: bool) -> None:
            repository = hub.repositories[name]
            if repository.gated:
                self._answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
                return
            if repository.private and not authorized:
                self._answer(401, {"X-Error-Code": "RepoNotFound"})
                return
            data = repository.files[commit].get(path)
            if data is None:
                self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(data)}"'}
            if len(data) < LARGE_BYTES:
                self._bytes(data, headers)
                return
            ticket = len(hub.served)
            hub.served[str(ticket)] = 0
            location = f"http://localhost:{hub.port}/cdn/{name}/{commit}/{ticket}/{path}"
            linked = {
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
            commit_only = {name: text for name, text in hub.forged.items() if name == "X-Repo-Commit"}
            self._answer(302, {**headers, **linked, **commit_only, "Location": location})

        def _content(self, name: str, commit: str, ticket: str, path: str) -> None:
            hub.served[ticket] += 1
            if hub.served[ticket] > hub.expire_after:
                self._answer(403, {})
            else:
                self._bytes(hub.repositories[name].files[commit][path], {})

        def _bytes(self, data: bytes, headers: dict[str, str]) -> None:
            status = 200
            if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", "")):
                first, last = int(match[1]), min(int(match[2]), len(data) - 1)
                headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
                status, data = 206, data[first : last + 1]
            fault = hub.faults.pop(0) if hub.faults and self.command == "GET" else None
            if isinstance(fault, int):
                self._answer(fault, {})
                return
            length = len(data)
            if fault == "flip":
                data = bytes([data[0] ^ 1]) + data[1:]
            if fault in {"truncate", "stall"}:
                data = data[: length // 2]
            self._answer(status, {**headers, **hub.forged}, data, length)
            if fault == "stall":
                time.sleep(3)
            if fault in {"truncate", "stall"}:
                self.close_connection = True

        def _json(self, value: object) -> None:
            self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

        def _answer(
            self, status: int, headers: dict[str, str], data: bytes = b"", length: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": _blob_id(data)}
    if len(data) >= LARGE_BYTES:
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A stand-in that this process takes for the Hub, with its own empty cache and no token."""
    import huggingface_hub.constants

    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        forget_stores()
        yield server
        forget_stores()

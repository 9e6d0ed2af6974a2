"""Hubs that answer nonsense: each answer is one error that names the Hub, or a listing of plain names and sizes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

from expo_ray.errors import StorageError
from expo_ray.storage import forget_stores, open_store

_SHA = "a" * 40
_INFO: dict[str, Any] = {
    "id": "org/m",
    "sha": _SHA,
    "siblings": [
        {"rfilename": "config.json", "size": 5, "blobId": "b" * 40},
        {
            "rfilename": "model.safetensors",
            "size": 7,
            "blobId": "c" * 40,
            "lfs": {"size": 7, "sha256": "d" * 64, "pointerSize": 1},
        },
    ],
}


class _Hub(ThreadingHTTPServer):
    body = b""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, _Hub)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    server = _Hub(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    forget_stores()
    try:
        yield server
    finally:
        forget_stores()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_listing_is_read(hub: _Hub) -> None:
    hub.body = json.dumps(_INFO).encode()
    files = [(info.key, info.size, info.etag) for info in open_store("hf://org/m").list()]
    assert files == [("config.json", 5, "b" * 40), ("model.safetensors", 7, "d" * 64)]


def _listing(**changes: object) -> dict[str, Any]:
    return _INFO | {"siblings": [_INFO["siblings"][0] | changes]}


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        5,
        "x",
        {},
        {key: value for key, value in _INFO.items() if key != "id"},
        {key: value for key, value in _INFO.items() if key != "sha"},
        _INFO | {"sha": ["x"]},
        _INFO | {"sha": "../../x"},
        _INFO | {"sha": "a\nb"},
        _INFO | {"siblings": 5},
        _INFO | {"siblings": ["x"]},
        _INFO | {"siblings": [{}]},
        _listing(size="x"),
        _listing(size=-5),
        _listing(size=1.5),
        _listing(size=10**30),
        _listing(size=True),
        _listing(blobId=5),
        _listing(rfilename=5),
        _listing(rfilename=None),
        _listing(rfilename="../x"),
        _listing(lfs=5),
        _listing(lfs={"sha256": "x"}),
        _listing(lfs={"size": 5, "sha256": 5, "pointerSize": 1}),
    ],
    ids=lambda answer: json.dumps(answer)[-60:],
)
def test_an_answer_with_fields_of_other_types_is_one_error(hub: _Hub, answer: object) -> None:
    hub.body = json.dumps(answer).encode()
    with pytest.raises(StorageError, match=r"^hf://org/m"):
        open_store("hf://org/m")


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[" * 100_000, b"\xff\xfe", b"9" * 5000], ids=lambda body: repr(body[:8])
)
def test_what_is_no_json_is_one_error(hub: _Hub, body: bytes) -> None:
    hub.body = body
    with pytest.raises(StorageError, match=r"^hf://org/m"):
        open_store("hf://org/m")

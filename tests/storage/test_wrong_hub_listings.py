"""Hubs that answer nonsense: each answer is one error that names the Hub, or a listing of plain names and sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

from expo_ray.errors import StorageError
from expo_ray.storage import open_store
from tests.support.fixed_answer import FixedAnswer, answering

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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FixedAnswer]:
    server = FixedAnswer("application/json")
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with answering(server):
        yield server


def test_a_listing_is_read(hub: FixedAnswer) -> None:
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
def test_an_answer_with_fields_of_other_types_is_one_error(hub: FixedAnswer, answer: object) -> None:
    hub.body = json.dumps(answer).encode()
    with pytest.raises(StorageError, match=r"^hf://org/m"):
        open_store("hf://org/m")


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[" * 100_000, b"\xff\xfe", b"9" * 5000], ids=lambda body: repr(body[:8])
)
def test_what_is_no_json_is_one_error(hub: FixedAnswer, body: bytes) -> None:
    hub.body = body
    with pytest.raises(StorageError, match=r"^hf://org/m"):
        open_store("hf://org/m")

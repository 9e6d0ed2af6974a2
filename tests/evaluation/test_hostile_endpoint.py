"""Endpoints that answer nonsense, without end, or packed a thousandfold: each is one error, within bounded time and memory."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from expo_ray.errors import EndpointError
from expo_ray.evaluation.responses.client import Answer, Client, GaveUp, Refused
from expo_ray.evaluation.responses.endpoint import MOST_BYTES, Card

_GOOD: dict[str, Any] = {
    "choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 3, "prompt_tokens": 5},
}
_CARD: dict[str, Any] = {"id": "m", "owned_by": "x", "metadata": {"engine": "vllm 1", "max_model_len": 64}}


class Server:
    """Answers every request with one status, body and set of headers."""

    def __init__(self) -> None:
        self.status, self.url = 200, ""
        self.pieces: list[bytes] = []
        self.endless = False
        self.headers: Mapping[str, str] = {}


@contextmanager
def _serving() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer()

        def _answer(self) -> None:
            self.close_connection = True
            self.send_response(server.status)
            self.send_header("Connection", "close")
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):
                for piece in server.pieces:
                    self.wfile.write(piece)
                while server.endless:
                    self.wfile.write(b" " * (1 << 20))

        def log_message(self, *arguments: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_port}"
    try:
        yield server
    finally:
        server.endless = False
        listening.shutdown()
        thread.join()
        listening.server_close()


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with _serving() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.status, running.pieces, running.endless, running.headers = 200, [], False, {}
    return running


def _chat(server: Server, timeout_s: float = 30.0) -> Answer:
    async def ask() -> Answer:
        async with Client(server.url, attempts=1, delay_s=0.01, timeout_s=timeout_s) as client:
            return await client.chat("m", [{"role": "user", "content": "hi"}], {})

    return asyncio.run(ask())


def _card(server: Server) -> Card:
    async def ask() -> Card:
        async with Client(server.url, attempts=1) as client:
            return await client.card("m")

    return asyncio.run(ask())


def test_a_packed_answer_is_read(server: Server) -> None:
    server.pieces, server.headers = [gzip.compress(json.dumps(_GOOD).encode())], {"Content-Encoding": "gzip"}
    answer = _chat(server)
    assert (answer.text, answer.num_tokens, answer.num_prompt_tokens, answer.finish_reason) == (
        "hello",
        3,
        5,
        "stop",
    )


def test_half_a_surrogate_pair_becomes_a_question_mark(server: Server) -> None:
    server.pieces = [json.dumps(_GOOD).replace("hello", "a\\ud83d").encode()]
    assert _chat(server).text == "a?"


def test_null_counts_as_absent(server: Server) -> None:
    server.pieces = [b'{"choices": [{"message": {"content": null}, "finish_reason": null}], "usage": null}']
    answer = _chat(server)
    assert (answer.text, answer.num_tokens, answer.finish_reason) == ("", 0, "")


_COMPLETIONS: list[bytes] = [
    b"",
    b"null",
    b"[]",
    b"\xff",
    b"[" * 200_000,
    b'{"choices": []}',
    b'{"choices": {}}',
    b'{"choices": [null]}',
    b'{"choices": [{"message": "x"}]}',
    b'{"choices": [{"message": {"content": ["x"]}}]}',
    *(
        json.dumps(_GOOD).replace('"completion_tokens": 3', f'"completion_tokens": {value}').encode()
        for value in ("1e999", "9" * 4000, "9" * 5000, '"3"', "[3]", "-3", "NaN", "true", "3.5")
    ),
    *(
        json.dumps(_GOOD).replace('"finish_reason"', f'"token_ids": {value}, "finish_reason"').encode()
        for value in ("5", '"ab"', "[1.5]", "{}")
    ),
    *(
        json.dumps(_GOOD).replace('"usage"', f'"prompt_logprobs": {value}, "usage"').encode()
        for value in ("5", "[5]", '[{"1": 5}]', '[{"1": {"logprob": "x"}}]', '{"a": 1}')
    ),
]


@pytest.mark.parametrize("body", _COMPLETIONS, ids=lambda body: repr(body[-48:]))
def test_each_malformed_answer_is_given_up(server: Server, body: bytes) -> None:
    server.pieces = [body]
    with pytest.raises(GaveUp, match="not the answer to a chat"):
        _chat(server)


@pytest.mark.parametrize("charset", ["zlib", "idna", "undefined", "utf-16", "rot13"])
@pytest.mark.parametrize("status", [200, 400, 500])
def test_no_header_decides_how_a_body_is_read(server: Server, charset: str, status: int) -> None:
    server.status, server.pieces = status, [b"\xff{{"]
    server.headers = {"Content-Type": f"text/plain; charset={charset}"}
    with pytest.raises((GaveUp, Refused)):
        _chat(server)


def _bomb(mebibytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(b" " * 2**20) for _ in range(mebibytes)) + packer.flush()


@pytest.mark.parametrize("status", [200, 400, 503])
@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
def test_a_packed_bomb_is_not_unpacked(server: Server, status: int, coding: str) -> None:
    server.status, server.headers = status, {"Content-Encoding": coding}
    server.pieces = [_bomb(1 + MOST_BYTES // 2**20)]
    with pytest.raises(GaveUp, match="no answer"):
        _chat(server)
    with pytest.raises(EndpointError, match="cannot be reached"):
        _card(server)


def test_a_body_without_end_is_given_up(server: Server) -> None:
    server.endless = True
    with pytest.raises(GaveUp, match="more than"):
        _chat(server)


@pytest.mark.parametrize(
    "change",
    [
        {"max_model_len": "evil"},
        {"max_model_len": 10**30},
        {"max_model_len": -1},
        {"special_ids": "text"},
        {"special_ids": 5},
        {"special_ids": ["1"]},
        {"engine": ["vllm"]},
        {"weights": {}},
    ],
    ids=str,
)
def test_a_card_with_values_of_other_types_is_one_error(server: Server, change: dict[str, object]) -> None:
    server.pieces = [json.dumps(_CARD | {"metadata": _CARD["metadata"] | change}).encode()]
    with pytest.raises(EndpointError, match="see to the endpoint"):
        _card(server)


def test_metadata_of_another_kind_is_somebody_elses(server: Server) -> None:
    server.pieces = [json.dumps(_CARD | {"metadata": ["x"], "max_model_len": 32}).encode()]
    assert _card(server) == Card("m", max_model_len=32)

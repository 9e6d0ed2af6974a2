"""A client of endpoints that limit, refuse and rename."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from expo_ray.evaluation.responses.client import Answer, Client
from expo_ray.evaluation.responses.endpoint import retry_after_s

Reply = tuple[int, Mapping[str, str], Any]
MESSAGES = [{"role": "user", "content": "?"}]
LOGPROBS = [
    {"token": "m", "logprob": -0.1, "top_logprobs": [{"token": "m", "logprob": -0.1}, {"token": "M", "logprob": -2.5}]}
]  # fmt: skip


def answered(**choice: Any) -> Reply:
    message = {"role": "assistant", "content": "m"}
    usage = {"prompt_tokens": 7, "completion_tokens": 1}
    return 200, {}, {"choices": [{"message": message, "finish_reason": "stop", **choice}], "usage": usage}


@contextmanager
def endpoint(reply: Callable[[int, Mapping[str, Any]], Reply]) -> Iterator[tuple[str, list[Any]]]:
    """An endpoint whose answer to the n-th request is `reply(n, body)`; yields its URL and what it received."""
    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.headers.get("Authorization"), body))
            status, headers, data = reply(len(received), body)
            sent = json.dumps(data).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(sent)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", received
    finally:
        server.shutdown()
        server.server_close()


def ask(url: str, options: Mapping[str, Any] | None = None, **arguments: Any) -> Answer:
    async def run() -> Answer:
        async with Client(url, delay_s=0.01, **arguments) as client:
            return await client.chat("judge", MESSAGES, options or {})

    return asyncio.run(run())


def test_log_probabilities_of_each_token() -> None:
    with endpoint(lambda _, body: answered(logprobs={"content": LOGPROBS})) as (url, _):
        assert ask(url).top_logprobs == [{"m": -0.1, "M": -2.5}]


def test_a_key_goes_to_its_own_endpoint_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-openai")
    monkeypatch.setenv("JUDGE_KEY", "key-of-the-judge")
    with endpoint(lambda _, body: answered()) as (url, received):
        ask(url)
        ask(url, key_variable="JUDGE_KEY")
        ask(url, key_variable="")
    assert [key for key, _ in received] == ["Bearer key-of-openai", "Bearer key-of-the-judge", None]


def test_max_tokens_is_renamed_for_models_that_ask_for_it() -> None:
    def reply(number: int, body: Mapping[str, Any]) -> Reply:
        if "max_tokens" in body:
            return (
                400,
                {},
                {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}},
            )
        return answered()

    with endpoint(reply) as (url, received):
        assert ask(url, {"max_tokens": 3}).text == "m"
    assert received[-1][1]["max_completion_tokens"] == 3
    assert len(received) == 2


def test_an_endpoint_that_names_the_time_to_wait_is_asked_more_often_than_one_that_fails() -> None:
    def reply(number: int, body: Mapping[str, Any]) -> Reply:
        return (
            answered() if number > 5 else (429, {"Retry-After": "0.05"}, {"error": {"message": "slow down"}})
        )

    with endpoint(reply) as (url, received):
        assert ask(url, attempts=3).text == "m"
    assert len(received) == 6


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("2", 2, 2), ("1.5", 1.5, 1.5), (formatdate(4102444800, usegmt=True), 600, 600), ("0", 0, 0),
     ("-3", 0, 0), ("nan", 0, 0), ("inf", 600, 600), ("soon", 0, 0), ("", 0, 0), (formatdate(0, usegmt=True), 0, 0)],
)  # fmt: skip
def test_every_form_of_retry_after(header: str, least: float, most: float) -> None:
    response = httpx.Response(429, headers={"Retry-After": header})
    assert least <= retry_after_s(response) <= most

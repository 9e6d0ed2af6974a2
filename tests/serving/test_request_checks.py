"""Requests that the endpoint refuses before a model sees them, through the application itself, without an engine."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from expo_ray.on_ray.serving.ingress import web_app
from expo_ray.serving.request_checks import MOST_BYTES

pytestmark = pytest.mark.vllm

KEY = "sesame-open"


def application(**options: Any) -> FastAPI:
    """The endpoint's own, with a page that gives its body back."""
    app = web_app(**options)

    @app.post("/v1/completions")
    async def echo(request: Request) -> dict[str, Any]:
        return {"got": await request.json()}

    return app


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def post(app: FastAPI, content: bytes | str, **headers: str) -> httpx.Response:
    return ask(app, "POST", "/v1/completions", content=content, headers=headers)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("10.1.2.3", 200),
        ("gateway.example:443", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("[evil]", 421),
    ],
)
def test_a_host_that_is_not_this_machine_s_is_refused(host: str, status: int) -> None:
    app = application(hosts=["gateway.example"])
    assert post(app, '{"prompt": "a"}', Host=host).status_code == status


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY} ", 200),
        ("", 401),
        ("Bearer ", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {hashlib.sha256(KEY.encode()).hexdigest()}", 401),
    ],
)
def test_a_key_is_asked_for(header: str, status: int) -> None:
    app = application(key_digest=hashlib.sha256(KEY.encode()).hexdigest())
    response = post(app, '{"prompt": "a"}', Authorization=header)
    assert response.status_code == status
    assert KEY not in response.text


def test_health_takes_no_key_and_nothing_else_does_without() -> None:
    app = application(key_digest=hashlib.sha256(KEY.encode()).hexdigest())
    assert ask(app, "GET", "/health").status_code == 200
    for path in ("/v1/models", "/v1/models/health", "/openapi.json", "/v1/health"):
        assert ask(app, "GET", path).status_code == 401


def test_no_page_loads_scripts_from_elsewhere() -> None:
    for path in ("/docs", "/redoc"):
        assert ask(application(), "GET", path).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": ""}',
        '{"prompt": []}',
        '{"prompt": ["a", ""]}',
        '{"prompt": [[1], []]}',
        '{"prompt": "\\ud800"}',
        '{"messages": [{"role": "user", "content": "a\\udfffb"}]}',
        '{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"prompt": "a"',
        "",
        b"\xff\xfe",
    ],
)
def test_a_body_that_no_model_can_take_is_a_bad_request(body: str | bytes) -> None:
    response = post(application(), body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == 400


def test_bodies_are_bounded_whether_or_not_they_tell_their_length() -> None:
    async def endless() -> Any:
        for _ in range(MOST_BYTES // 2**20 + 2):
            yield b" " * 2**20

    assert post(application(), b" " * (MOST_BYTES + 1)).status_code == 413
    assert ask(application(), "POST", "/v1/completions", content=endless()).status_code == 413


def test_a_good_body_arrives_as_it_was_sent() -> None:
    body = {"prompt": ["a", "\u2028 \U0001f600"], "stop": ["x"] * 3, "logit_bias": {"1": -1.5}}
    assert post(application(), json.dumps(body)).json()["got"] == body
    assert post(application(), json.dumps({"prompt": [0, 1]})).status_code == 200

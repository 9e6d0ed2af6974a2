"""Check requests before a model sees them: a known host, the key, a bounded size and depth."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from expo_ray.errors import ExpoError
from expo_ray.text import shown
from expo_ray.untrusted import parse_json

# A request with a million tokens in it is smaller.
MOST_BYTES = 32 * 2**20
RETRY_AFTER_S = 5
# For load balancers; it reveals nothing, and needs no key.
HEALTH = "/health"
_LOCAL = {"localhost", "localhost.localdomain", "ip6-localhost"}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class _Refusal(Exception):
    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        self.status, self.message, self.kind = status, message, kind
        super().__init__(message)


class RequestChecks:
    """ASGI middleware that answers bad requests itself and passes the others on.

    Args:
        hosts: names that a request may give as its host, beside addresses and this machine's own; a page of another site whose
            name is made to resolve to this address (DNS rebinding) gives another.
        key_digest: SHA-256 of the key that requests need, as hex digits; empty for none. The key itself stays with the driver.
    """

    def __init__(self, app: Application, *, hosts: Collection[str] = (), key_digest: str = "") -> None:
        self._app, self._hosts, self._key_digest = app, {host.lower() for host in hosts}, key_digest

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check_host(headers.get(b"host", b""))
            if scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) != HEALTH:
                self._check_key(headers.get(b"authorization", b""))
            body = await _body(headers.get(b"content-length", b""), receive)
            if scope["method"] == "POST":
                _check_json(body)
        except _Refusal as refusal:
            await _send(send, refusal)
            return
        await self._app(scope, _replayed(body, receive), send)

    def _check_host(self, header: bytes) -> None:
        host = header.decode("latin-1").strip().lower()
        name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if not name or name in _LOCAL or name in self._hosts or _is_address(name):
            return
        raise _Refusal(
            421,
            f"the host {shown(name)!r} is not served here; ask by address, or list it under `serving.hosts`",
        )

    def _check_key(self, header: bytes) -> None:
        if not self._key_digest:
            return
        given = header.removeprefix(b"Bearer ").removeprefix(b"bearer ").strip()
        if not hmac.compare_digest(hashlib.sha256(given).hexdigest(), self._key_digest):
            raise _Refusal(
                401, "this endpoint asks for a key; send it as `Authorization: Bearer KEY`", "invalid_api_key"
            )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _body(length: bytes, receive: Receive) -> bytes:
    too_long = _Refusal(413, f"the request is longer than {MOST_BYTES} bytes; send less at once")
    if length.isdigit() and (len(length) > 12 or int(length) > MOST_BYTES):
        raise too_long
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MOST_BYTES:
            raise too_long
    return b"".join(parts)


def _check_json(body: bytes) -> None:
    """Refuse bodies that later parsers fail on, such as half a surrogate pair or a thousand brackets, and prompts without a token."""
    try:
        data = parse_json(body, "the request", most_bytes=MOST_BYTES, remedy="send one JSON object")
    except ExpoError as error:
        raise _Refusal(400, str(error)) from error
    prompt = data.get("prompt") if isinstance(data, dict) else None
    if prompt in ("", []) or (isinstance(prompt, list) and any(part in ("", []) for part in prompt)):
        raise _Refusal(400, "`prompt` is empty; send at least one token")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Make a `receive` that gives the body once more, then what follows it: the end of the connection."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _send(send: Send, refusal: _Refusal) -> None:
    error = {"message": refusal.message, "type": refusal.kind, "param": None, "code": refusal.status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

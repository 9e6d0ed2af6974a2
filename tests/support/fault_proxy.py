"""A loopback HTTP proxy that misbehaves on demand, between an S3 client and a real server.

Request signatures survive, since the Host header is passed on unchanged. Messages are held whole in memory: parts of an upload
and ranges of a download are a few MiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import struct
import threading
from dataclasses import dataclass, field
from enum import StrEnum, auto
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class Action(StrEnum):
    SLOW_DOWN = auto()  # 503 without asking the server
    CONFLICT = (
        auto()
    )  # 409 without asking the server, as AWS answers while another request to the key is under way
    NO_SUCH_UPLOAD = auto()  # 404 without asking the server
    RESET = auto()  # connection reset before the answer; the server is not asked
    RESET_BODY = auto()  # connection reset half way through the answer's body
    TRUNCATE = auto()  # connection closed in good order half way through the answer's body
    STALL = auto()  # no answer
    STALL_BODY = auto()  # half of the answer's body, then silence
    FLIP_READ = auto()  # one bit of the answer's body
    FLIP_WRITE = auto()  # one bit of the request's body
    LOSE_ACK = auto()  # the server does as asked, the client never hears of it


IN_ANSWER_BODY = {Action.RESET_BODY, Action.TRUNCATE, Action.STALL_BODY, Action.FLIP_READ}


@dataclass
class Fault:
    """What to do to matching requests.

    Attributes:
        method: HTTP method, or any if empty.
        path: regular expression searched for in path and query.
        skip: matching requests let through first.
        times: requests harmed after that.
    """

    action: Action
    method: str = ""
    path: str = ""
    skip: int = 0
    times: int = 1
    seen: int = field(default=0, init=False)

    def strikes(self, method: str, target: str) -> bool:
        if (self.method and method != self.method) or not re.search(self.path, target):
            return False
        self.seen += 1
        return self.skip < self.seen <= self.skip + self.times


@dataclass
class _Message:
    first_line: str
    headers: dict[str, str]
    head: bytes
    body: bytes

    @property
    def raw(self) -> bytes:
        return self.head + self.body


class FaultProxy:
    """Runs in its own thread while the `with` block lasts.

    Args:
        upstream: endpoint of the real server, `http://127.0.0.1:<port>`.
        tls: speak https to the client.
        listener: where clients knock; a free port of 127.0.0.1 if left out.

    Attributes:
        endpoint: what the client is to be given.
        log: (action, method, path and query) of every fault injected.
        requests: (method, path and query) of every request seen.
    """

    def __init__(
        self, upstream: str, tls: ssl.SSLContext | None = None, listener: socket.socket | None = None
    ) -> None:
        self._upstream = urlsplit(upstream)
        self._faults: list[Fault] = []
        self.log: list[tuple[Action, str, str]] = []
        self.requests: list[tuple[str, str]] = []
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(),), daemon=True
        )
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self._tls = tls
        host, port = self._listener.getsockname()
        self.endpoint = f"{'https' if tls else 'http'}://{host}:{port}"

    def inject(self, *faults: Fault) -> None:
        """Replace the faults in force; the log starts anew."""
        self._faults = list(faults)
        self.log.clear()
        self.requests.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._connection, sock=self._listener, limit=1 << 20, ssl=self._tls
        )
        await self._stopped.wait()
        server.close()
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while True:
                request = await _read_message(reader, answers="")
                up = up or await asyncio.open_connection(
                    self._upstream.hostname, self._upstream.port, limit=1 << 20
                )
                await self._exchange(request, writer, *up)
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass  # one side hung up, or the proxy ends
        finally:
            for open_end in (writer, up[1] if up else None):
                if open_end is not None:
                    open_end.close()

    async def _exchange(
        self,
        request: _Message,
        client: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        """One request and its answer; a ConnectionError ends the client's connection."""
        method, target, _ = request.first_line.split(" ", 2)
        action = self._pick(method, target)
        if action in _CANNED:
            await _send(client, _canned(action, method))
            return
        if action is Action.STALL:
            await asyncio.sleep(3600)
        if action is Action.RESET:
            _reset(client)
        up_writer.write(
            request.head + (_flipped(request.body) if action is Action.FLIP_WRITE else request.body)
        )
        await up_writer.drain()
        answer = await _read_message(up_reader, answers=method)
        if action is Action.LOSE_ACK:
            _reset(client)
        await _send_harmed(client, answer, action)

    def _pick(self, method: str, target: str) -> Action | None:
        self.requests.append((method, target))
        for fault in self._faults:
            if fault.strikes(method, target):
                self.log.append((fault.action, method, target))
                return fault.action
        return None


_CANNED = {
    Action.SLOW_DOWN: (
        b"503 Slow Down",
        b"<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>",
    ),
    Action.NO_SUCH_UPLOAD: (b"404 Not Found", b"<Error><Code>NoSuchUpload</Code></Error>"),
    Action.CONFLICT: (b"409 Conflict", b"<Error><Code>ConditionalRequestConflict</Code></Error>"),
}


def _canned(action: Action, method: str) -> bytes:
    status, body = _CANNED[action]
    head = b"HTTP/1.1 %s\r\ncontent-type: application/xml\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
    return head if method == "HEAD" else head + body


async def _read_message(reader: asyncio.StreamReader, *, answers: str) -> _Message:
    """One request (`answers` empty), or the answer to a request of that method."""
    head = await reader.readuntil(b"\r\n\r\n")
    first_line, *lines = head.decode("latin1").rstrip("\r\n").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = b""
    if answers != "HEAD":
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = await _read_chunks(reader)
        else:
            body = await reader.readexactly(int(headers.get("content-length", "0")))
    return _Message(first_line, headers, head, body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    """A chunked body with its framing."""
    body = b""
    while True:
        size = await reader.readline()
        data = await reader.readexactly(int(size.split(b";")[0], 16) + 2)
        body += size + data
        if len(data) == 2:
            return body


async def _send_harmed(client: asyncio.StreamWriter, answer: _Message, action: Action | None) -> None:
    if action not in IN_ANSWER_BODY:
        await _send(client, answer.raw)
        return
    if action is Action.FLIP_READ:
        await _send(client, answer.head + _flipped(answer.body))
        return
    await _send(client, answer.head + answer.body[: len(answer.body) // 2])
    if action is Action.STALL_BODY:
        await asyncio.sleep(3600)
    if action is Action.RESET_BODY:
        await asyncio.sleep(0.05)  # a reset overtakes data that is still in the socket's buffer
        _reset(client)
    raise ConnectionError("the rest is cut off")


async def _send(client: asyncio.StreamWriter, data: bytes) -> None:
    client.write(data)
    await client.drain()


def _flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


def _reset(client: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    with contextlib.suppress(OSError):
        client.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    client.transport.abort()
    raise ConnectionResetError("by the proxy")

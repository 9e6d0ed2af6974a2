"""A server that gives the same answer to every GET."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from expo_ray.storage import forget_stores


class FixedAnswer(ThreadingHTTPServer):
    """A server on a free port of loopback.

    Attributes:
        body: of its answers.
    """

    body = b""

    def __init__(self, content_type: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content_type = content_type

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, FixedAnswer)
        self.send_response(200)
        self.send_header("Content-Type", self.server.content_type)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def answering(server: FixedAnswer) -> Iterator[FixedAnswer]:
    """Run the server in a thread; stores that were opened before or meanwhile are forgotten."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    forget_stores()
    try:
        yield server
    finally:
        forget_stores()
        server.shutdown()
        thread.join()
        server.server_close()

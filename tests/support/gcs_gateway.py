"""Google Cloud Storage's XML API in front of a real S3 server.

No emulator of Google's store takes uploads in that language, which obstore speaks: fake-gcs-server 1.52 and gcp-storage-emulator
know JSON alone. The two languages differ in few places, which this gateway translates as Google documents them; all else is done by
SeaweedFS. https://cloud.google.com/storage/docs/xml-api/reference-headers
"""

from __future__ import annotations

import http.client
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

from examples.local_s3 import ACCESS_KEY, SECRET_KEY, SeaweedFS
from expo_ray.storage import forget_stores

# Those of the hop, and of S3's own language, which Google does not look at.
_DROPPED = ("authorization", "connection", "host", "x-goog-", "x-amz-", "expect", "transfer-encoding")


@pytest.fixture(scope="session")
def gcs_gateway(s3_server: SeaweedFS) -> Iterator[str]:
    """The address of the gateway."""

    class Handler(_Handler):
        upstream = s3_server.endpoint

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def gcs_uri(gcs_gateway: str, s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder that no other test uses, reachable with this process's environment."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_gateway)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    forget_stores()
    yield f"gs://{s3_server.bucket}/{uuid.uuid4().hex}"
    forget_stores()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str

    def do_GET(self) -> None:
        self._forward()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not (self.headers.get("Authorization") or "").startswith("Bearer "):
            self._answer(401, [], b"<Error><Code>AuthenticationRequired</Code></Error>")
            return
        headers = {
            name: value for name, value in self.headers.items() if not name.lower().startswith(_DROPPED)
        }
        if self.command == "PUT":
            headers.pop("if-none-match", None)  # Google takes it for reads alone
            if self.headers.get("x-goog-if-generation-match") == "0":
                headers["If-None-Match"] = "*"
        path, question, query = self.path.partition("?")
        target = (
            quote(unquote(path), safe="/-_.~") + question + query
        )  # as AWS signs it; obstore writes `/` as %2F here
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=60)
        try:
            connection.request(self.command, target, body, self._signed(target, headers, body))
            answer = connection.getresponse()
            self._answer(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()

    def _signed(self, target: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
        """The headers with what lets the S3 server take the request."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        request: Any = AWSRequest(self.command, self.upstream + target, headers=headers, data=body)
        S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(request)
        return dict(request.headers.items())

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        kept = [
            (name, value)
            for name, value in headers
            if not name.lower().startswith(("x-amz-", "connection", "transfer-encoding"))
        ]
        if self.command != "HEAD":
            kept = [(name, value) for name, value in kept if name.lower() != "content-length"]
            kept.append(("Content-Length", str(len(body))))
        for name, value in kept:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

"""A store that redirects to another host, which must not get the session token, or that answers with another version."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from expo_ray.errors import InputChanged, StorageError, TransientStorageError
from expo_ray.storage import forget_stores, open_store


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, bool]]]:
    """Requests as (host, path, with a token) seen by a store at 127.0.0.1 that redirects to localhost."""
    seen: list[tuple[str, str, bool]] = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers["Host"].partition(":")[0]
            seen.append((host, self.path, "x-amz-security-token" in self.headers))
            if host == "127.0.0.1" and not self.path.endswith("/replaced"):
                self.send_response(307)
                self.send_header("Location", f"http://localhost:{server.server_port}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", "bytes 0-3/4")
            self.send_header("ETag", 'W/"another"')
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"evil")

        do_HEAD = do_PUT = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Redirecting)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_SESSION_TOKEN": "token",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    forget_stores()
    yield seen
    forget_stores()
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_request_follows_a_redirect_to_another_host(hosts: list[tuple[str, str, bool]]) -> None:
    store = open_store("s3://bucket/folder")
    for ask in (
        store.list,
        lambda: store.stat("x"),
        lambda: store.read("x"),
        lambda: store.read_into("x", 0, memoryview(bytearray(4)), etag='"planned"'),
        lambda: store.put("x", b"data"),
        lambda: store.put_if_absent("x", b"data"),
        lambda: store.delete("x"),
    ):
        with pytest.raises(StorageError, match="redirects to another host") as caught:
            ask()
        assert not isinstance(caught.value, TransientStorageError)

    assert {host for host, _, _ in hosts} == {"127.0.0.1"}
    assert all(with_token for _, _, with_token in hosts)


def test_a_store_that_ignores_if_match_is_found_out(hosts: list[tuple[str, str, bool]]) -> None:
    store, out = open_store("s3://bucket/folder"), memoryview(bytearray(4))
    with pytest.raises(InputChanged, match="replaced"):
        store.read_into("replaced", 0, out, etag='"planned"')
    assert bytes(out) == b"\0" * 4
    store.read_into("replaced", 0, out, etag='"another"')  # a proxy that compresses marks ETags as weak
    assert bytes(out) == b"evil"


@pytest.mark.parametrize(
    ("proxy", "excluded", "followed"),
    [("http://proxy:3128", "", True), ("http://proxy:3128", "127.0.0.1", False), ("", "", False)],
)
def test_a_real_proxy_stays_in_use(
    proxy: str, excluded: str, followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expo_ray.storage.s3_connection import _no_redirects

    for name in ("http_proxy", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", excluded)
    assert (_no_redirects("http://127.0.0.1:9000") == {}) == followed

"""Stores whose listings are wrong or have no end: one error, within bounded time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from expo_ray.errors import StorageError
from expo_ray.storage import open_store
from tests.support.fixed_answer import FixedAnswer, answering

_ITEM = '<Contents><Key>x/{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"a"</ETag><Size>{size}</Size></Contents>'
_PAGE = (
    '<?xml version="1.0"?><ListBucketResult><Name>b</Name><KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys>'
    "<IsTruncated>{truncated}</IsTruncated>{token}{items}</ListBucketResult>"
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FixedAnswer]:
    server = FixedAnswer("application/xml")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with answering(server):
        yield server


def _page(*items: tuple[str, str], endless: bool = False) -> bytes:
    text = "".join(_ITEM.format(key=key, size=size) for key, size in items)
    token = "<NextContinuationToken>again</NextContinuationToken>" if endless else ""
    return _PAGE.format(truncated=str(endless).lower(), token=token, items=text).encode()


def test_a_listing_that_ends_is_read(server: FixedAnswer) -> None:
    server.body = _page(("a", "5"), ("b", "0"))
    assert [(info.key, info.size) for info in open_store("s3://b/x").list()] == [("a", 5), ("b", 0)]


def test_a_listing_that_begins_again_is_refused(server: FixedAnswer) -> None:
    server.body = _page(("a", "5"), ("b", "6"), endless=True)
    with pytest.raises(StorageError, match="does not end"):
        open_store("s3://b/x").list()


@pytest.mark.parametrize("size", ["x", "-5", "", "1e9", "9" * 30])
def test_a_size_that_is_none_is_refused(server: FixedAnswer, size: str) -> None:
    server.body = _page(("a", size))
    with pytest.raises(StorageError):
        open_store("s3://b/x").list()


@pytest.mark.parametrize("page", [b"", b"<", b"{}", b"<ListBucketResult>" * 10_000, b"\xff\xfe"], ids=repr)
def test_what_is_no_listing_is_refused(server: FixedAnswer, page: bytes) -> None:
    server.body = page[:200_000]
    with pytest.raises(StorageError):
        open_store("s3://b/x").list()

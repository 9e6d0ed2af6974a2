"""S3 and everything that speaks its language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from expo_ray.errors import StorageError, TransientStorageError
from expo_ray.storage.checksums import CRC_BYTES, Checksum, parse_checksum
from expo_ray.storage.object_errors import retry_after_s, translate_botocore
from expo_ray.storage.object_store import ObjectStore, same_etag
from expo_ray.storage.protocol import BUFFER_BYTES, FileInfo
from expo_ray.storage.retry import retry_translated
from expo_ray.storage.s3_connection import S3Connection, connect
from expo_ray.storage.s3_writer import S3Writer
from expo_ray.storage.uri import Scheme


class S3Store(ObjectStore):
    """A folder of a bucket, `s3://bucket/folder`."""

    scheme: ClassVar[Scheme] = "s3"
    _connection: S3Connection

    def _connect(self, bucket: str) -> S3Connection:
        return connect(bucket)

    def checksum(self, info: FileInfo) -> Checksum | None:
        client = self._connection.headers
        wanted = {"Bucket": self._connection.bucket, "Key": self._path(info.key)}
        uri = f"{self.uri}/{info.key}"
        try:
            answer: Mapping[str, Any] = retry_translated(
                lambda: client.head_object(**wanted, ChecksumMode="ENABLED"),
                lambda error: translate_botocore(error, uri, self._connection),
                self._connection.pace,
            )
        except TransientStorageError:
            raise
        except StorageError:  # the caller reads on, and that says more than this request could
            return None
        if not same_etag(answer.get("ETag"), info.etag) or answer.get("ChecksumType") == "COMPOSITE":
            return None
        said = ((name, answer.get(f"Checksum{name}", "")) for name in CRC_BYTES)
        return next((parse_checksum(name, text) for name, text in said if text), None)

    def writer(self, key: str, size: int, *, buffer_bytes: int = BUFFER_BYTES) -> S3Writer:
        path = self._path(key)
        return S3Writer(
            self._connection,
            path,
            lambda: self.stat(key),
            uri=f"{self.uri}/{key}",
            size=size,
            buffer_bytes=buffer_bytes,
        )

    def _retry_after_s(self, uri: str) -> float:
        """Ask once more, through a client that shows the headers of an answer, how long the store wants to be left alone.

        obstore drops `Retry-After`. Of a burst of refusals, the first asks for all.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        if self._connection.pace.in_refusal():
            return 0.0
        key = uri.removeprefix(f"s3://{self._connection.bucket}").strip("/")
        try:
            self._connection.headers.head_object(Bucket=self._connection.bucket, Key=key or "x")
        except ClientError as error:
            return retry_after_s(error)
        except BotoCoreError:
            return 0.0
        return 0.0

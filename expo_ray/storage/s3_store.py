"""S3 and everything that speaks its language."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from expo_ray.errors import StorageError, TransientStorageError
from expo_ray.storage.checksums import CRC_BYTES, Checksum, RangeChecksum, joined, parse_checksum
from expo_ray.storage.object_errors import retry_after_s, translate_botocore
from expo_ray.storage.object_store import ObjectStore, same_etag
from expo_ray.storage.object_writer import MAX_PARTS
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
        client, wanted = self._connection.headers, self._named(info)
        uri = f"{self.uri}/{info.key}"
        try:
            answer = self._ask(lambda: client.head_object(**wanted, ChecksumMode="ENABLED"), uri)
            if not same_etag(answer.get("ETag"), info.etag):
                return None
            if answer.get("ChecksumType") == "COMPOSITE":
                return self._checksum_of_parts(info, uri)
        except TransientStorageError:
            raise
        except StorageError:  # the caller reads on, and that says more than this request could
            return None
        said = ((name, answer.get(f"Checksum{name}", "")) for name in CRC_BYTES)
        return next((parse_checksum(name, text) for name, text in said if text), None)

    def _checksum_of_parts(self, info: FileInfo, uri: str) -> Checksum | None:
        """Combine the checksums of the parts that an object was uploaded in, as boto3 and others do it, into that of the whole.

        None where the store does not list them, as SeaweedFS, or refuses to (`s3:GetObjectAttributes`).
        """
        client, wanted = self._connection.headers, self._named(info)
        parts: list[Mapping[str, Any]] = []
        asked: dict[str, Any] = {"ObjectAttributes": ["ETag", "ObjectParts"], "MaxParts": 1000}
        while True:
            answer = self._ask(lambda: client.get_object_attributes(**wanted, **asked), uri)
            listed: Mapping[str, Any] = answer.get("ObjectParts", {})
            parts += listed.get("Parts", ())
            if answer.get("ETag", "").strip('"') != info.etag.strip('"') or len(parts) > MAX_PARTS:
                return None
            if not listed.get("IsTruncated"):
                break
            asked["PartNumberMarker"] = listed["NextPartNumberMarker"]
        return next(filter(None, (_combined(name, parts, info.size) for name in CRC_BYTES)), None)

    def _named(self, info: FileInfo) -> Mapping[str, str]:
        return {"Bucket": self._connection.bucket, "Key": self._path(info.key)}

    def _ask(self, ask: Callable[[], Mapping[str, Any]], uri: str) -> Mapping[str, Any]:
        connection = self._connection
        return retry_translated(
            ask, lambda error: translate_botocore(error, uri, connection), connection.pace
        )

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


def _combined(algorithm: str, parts: Sequence[Mapping[str, Any]], size: int) -> Checksum | None:
    """Checksum of an object of `size` bytes from those of its parts; None if a part has none, or they are not the whole object."""
    ranges, end = list[RangeChecksum](), 0
    for part in sorted(parts, key=lambda part: int(part["PartNumber"])):
        known = parse_checksum(algorithm, part.get(f"Checksum{algorithm}", ""))
        if known is None:
            return None
        ranges.append(RangeChecksum(end, end + int(part["Size"]), known.value))
        end = ranges[-1].end
    if not ranges or end != size:
        return None
    (whole,) = joined(algorithm, ranges)
    return Checksum(algorithm, whole.value)

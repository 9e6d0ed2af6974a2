"""Uploads to S3 that appear whole or not at all, whatever their size."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from expo_ray.errors import NotFound, StorageError, TransientStorageError
from expo_ray.storage.checksums import has_awscrt
from expo_ray.storage.object_errors import code_of, translate_botocore
from expo_ray.storage.object_writer import PARTS_IN_FLIGHT, Upload, part_bytes
from expo_ray.storage.protocol import FileInfo
from expo_ray.storage.retry import retry_translated
from expo_ray.storage.s3_connection import S3Connection

T = TypeVar("T")


class _UploadGone(StorageError):
    """The store does not know the upload: it is complete, or has to be begun anew. Asking again is in vain."""


class S3Writer(Upload):
    """A multipart upload, a few parts at a time; one plain PUT if it fits into a part.

    Each part is repeated by itself. If the answer to the very first request is lost, or the process is killed, an upload with an
    unknown id stays pending: as everywhere on S3, only a lifecycle rule (`AbortIncompleteMultipartUpload`) removes it.

    Args:
        path: key in the bucket.
        stat: looks at the object as it is now.
        uri: for messages.
        size: bytes announced.
        buffer_bytes: memory for parts, filling and under way.
    """

    def __init__(
        self,
        connection: S3Connection,
        path: str,
        stat: Callable[[], FileInfo],
        *,
        uri: str,
        size: int,
        buffer_bytes: int,
    ) -> None:
        super().__init__(stat, uri=uri, size=size)
        self._connection = connection
        self._object = {"Bucket": connection.bucket, "Key": path}
        self._part_bytes = part_bytes(size, buffer_bytes)
        self._in_flight = min(PARTS_IN_FLIGHT, buffer_bytes // self._part_bytes - 1)
        self._filling = bytearray()
        self._upload_id = ""
        self._checksum: dict[str, Any] = {}
        self._parts: list[Mapping[str, Any]] = []
        self._under_way: deque[Future[Mapping[str, Any]]] = deque()
        self._pool = ThreadPoolExecutor(max(1, self._in_flight), "part")

    def _take(self, view: memoryview) -> None:
        while view:
            room = self._part_bytes - len(self._filling)
            self._filling += view[:room]
            view = view[room:]
            if len(self._filling) == self._part_bytes and self._size > self._part_bytes:
                self._send()

    def abort(self) -> None:
        if not self._open:
            return
        self._close()
        if self._upload_id:
            # A part that is still under way may arrive after the first attempt; the pool has waited for those.
            with contextlib.suppress(StorageError):
                self._ask(
                    lambda: self._connection.headers.abort_multipart_upload(
                        **self._object, UploadId=self._upload_id
                    )
                )

    def _close(self) -> None:
        self._open = False
        self._filling = bytearray()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _send(self) -> None:
        """Send the part that is full, and wait until there is memory for the next."""
        if not self._upload_id:
            self._upload_id, self._checksum = self._begin()
        data, number = self._filling, len(self._parts) + len(self._under_way) + 1
        self._filling = bytearray()
        self._under_way.append(self._pool.submit(self._send_part, number, data))
        del data
        while len(self._under_way) > self._in_flight:
            self._parts.append(self._under_way.popleft().result())

    def _begin(self) -> tuple[str, dict[str, Any]]:
        """Begin the upload; returns its id, and the checksum of each part that the store is asked to compare.

        With CRC64NVME the store keeps a checksum of the whole object, which readers compare. One that does not know it compares a
        SHA256 of each part.
        """
        client = self._connection.headers
        if has_awscrt():
            try:
                answer = self._ask(
                    lambda: client.create_multipart_upload(
                        **self._object, ChecksumAlgorithm="CRC64NVME", ChecksumType="FULL_OBJECT"
                    )
                )
            except (TransientStorageError, NotFound):
                raise
            except StorageError:
                pass  # what refuses more than the checksum refuses the request below, too
            else:
                return answer["UploadId"], {"ChecksumAlgorithm": "CRC64NVME"}
        answer = self._ask(lambda: client.create_multipart_upload(**self._object, ChecksumAlgorithm="SHA256"))
        return answer["UploadId"], {"ChecksumAlgorithm": "SHA256"}

    def _send_part(self, number: int, data: bytearray) -> Mapping[str, Any]:
        def send() -> Mapping[str, Any]:
            if not self._open:
                raise StorageError(f"{self._uri}: the upload was given up")
            sent: Mapping[str, Any] = self._connection.headers.upload_part(
                **self._object, UploadId=self._upload_id, PartNumber=number, Body=data, **self._checksum
            )
            return sent

        answer = self._ask(send)
        checksum = f"Checksum{self._checksum['ChecksumAlgorithm']}"
        part = {"PartNumber": number, "ETag": answer["ETag"]}
        return part | ({checksum: answer[checksum]} if checksum in answer else {})

    def _finish(self) -> None:
        client = self._connection.headers
        if not self._upload_id and self._size <= self._part_bytes:
            checksum = {"ChecksumAlgorithm": "CRC64NVME" if has_awscrt() else "SHA256"}
            self._ask(lambda: client.put_object(**self._object, Body=self._filling, **checksum))
            return
        if self._filling:
            self._send()
        self._parts += [part.result() for part in self._under_way]
        self._ask(
            lambda: client.complete_multipart_upload(
                **self._object, UploadId=self._upload_id, MultipartUpload={"Parts": self._parts}
            )
        )
        self._upload_id = ""

    def _ask(self, ask: Callable[[], T]) -> T:
        connection = self._connection

        def translate(error: Exception) -> StorageError:
            translated = translate_botocore(error, self._uri, connection)
            return _UploadGone(str(translated)) if code_of(error) == "NoSuchUpload" else translated

        try:
            return retry_translated(ask, translate, connection.pace)
        except _UploadGone as error:
            raise TransientStorageError(str(error)) from error

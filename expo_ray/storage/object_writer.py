"""Uploads that appear whole or not at all, whatever their size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from typing_extensions import Buffer

from expo_ray.errors import NotFound, StorageError
from expo_ray.storage.object_errors import translate
from expo_ray.storage.protocol import FileInfo, Writer
from expo_ray.storage.s3_connection import Connection

PART_BYTES = 8 << 20
MAX_PARTS = 10_000
PARTS_IN_FLIGHT = 4


class S3Writer(Writer):
    """A multipart upload, `PARTS_IN_FLIGHT` parts at a time; one plain PUT if it fits into a part.

    If the answer to the very first request is lost, or the process is killed, an upload with an unknown id stays pending: as
    everywhere on S3, only a lifecycle rule (`AbortIncompleteMultipartUpload`) removes it.

    Args:
        path: key in the bucket.
        uri: for messages.
        size: bytes announced.
        stat: looks at the object as it is now.
    """

    def __init__(
        self, connection: Connection, path: str, uri: str, size: int, stat: Callable[[], FileInfo]
    ) -> None:
        import obstore

        self._connection = connection
        self._uri = uri
        self._size = size
        self._stat = stat
        self._written = 0
        self._open = True
        self._before = self._find()
        self._file = obstore.open_writer(
            connection.parts,
            path,
            buffer_size=max(PART_BYTES, -(-size // MAX_PARTS)),
            max_concurrency=PARTS_IN_FLIGHT,
        )

    def write(self, data: Buffer) -> None:
        # A copy, because obstore reads the buffer later, while it sends a part.
        piece = bytes(data)
        if self._written + len(piece) > self._size:
            raise StorageError(f"{self._uri}: more than the {self._size} bytes announced")
        try:
            self._file.write(piece)
        except Exception as error:
            raise translate(error, self._uri, self._connection) from error
        self._written += len(piece)

    def commit(self) -> FileInfo:
        if self._written != self._size:
            raise StorageError(f"{self._uri}: {self._written} bytes written, {self._size} announced")
        self._open = False
        try:
            self._file.close()
        except Exception as error:
            return self._landed_nevertheless(translate(error, self._uri, self._connection))
        info = self._stat()
        if info.size != self._size:
            raise StorageError(f"{self._uri} has {info.size} bytes after an upload of {self._size}")
        return info

    def abort(self) -> None:
        if not self._open:
            return
        self._open = False
        # obstore aborts the upload where a `with` block is left by an error, and only there.
        with contextlib.suppress(Exception):
            self._file.__exit__(RuntimeError, RuntimeError("aborted"), None)

    def _landed_nevertheless(self, error: StorageError) -> FileInfo:
        """Return the object, if only the acknowledgement of the upload was lost: obstore then asks again and gets `NoSuchUpload`."""
        info = self._find()
        if info is not None and info.size == self._size and info != self._before:
            return info
        raise error

    def _find(self) -> FileInfo | None:
        try:
            return self._stat()
        except NotFound:
            return None

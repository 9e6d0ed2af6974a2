"""Uploads that appear whole or not at all, whatever their size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from expo_ray.errors import NotFound, SlowDown, StorageError, TransientStorageError
from expo_ray.storage.connection import Connection
from expo_ray.storage.object_errors import translate
from expo_ray.storage.protocol import FileInfo, Writer

if TYPE_CHECKING:
    from obstore import WritableFile

# Stores count requests, so parts are as large as the memory for them allows. S3 takes no smaller ones but the last.
LARGEST_PART_BYTES = 32 << 20
LEAST_PART_BYTES = 5 << 20
# A small upload has parts, too: several are under way at a time, and one that fails is repeated by itself.
FEWEST_PARTS = 4
MAX_PARTS = 10_000
PARTS_IN_FLIGHT = 2


class Upload(Writer):
    """What uploads to any object store have in common.

    Args:
        stat: looks at the object as it is now.
        uri: for messages.
        size: bytes announced.
    """

    def __init__(self, stat: Callable[[], FileInfo], *, uri: str, size: int) -> None:
        self._stat, self._uri, self._size = stat, uri, size
        self._written = 0
        self._open = True
        self._before = self._find()

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        if self._written + len(view) > self._size:
            raise StorageError(f"{self._uri}: more than the {self._size} bytes announced")
        self._written += len(view)
        self._take(view)

    def commit(self) -> FileInfo:
        if self._written != self._size:
            raise StorageError(f"{self._uri}: {self._written} bytes written, {self._size} announced")
        try:
            self._finish()
        except TransientStorageError as error:
            info = self._landed_nevertheless(error)
        else:
            info = self._stat()
        self._close()
        if info.size != self._size:
            raise StorageError(f"{self._uri} has {info.size} bytes after an upload of {self._size}")
        return info

    @abstractmethod
    def _take(self, view: memoryview) -> None:
        """Take the next bytes; `view` may be reused afterwards."""

    @abstractmethod
    def _finish(self) -> None:
        """Make the object visible, with all that was written."""

    @abstractmethod
    def _close(self) -> None:
        """Let go of memory and threads, and stop what is under way."""

    def _landed_nevertheless(self, error: StorageError) -> FileInfo:
        """Return the object, if only the acknowledgement of the upload was lost: asked again, a store may not know it any more."""
        info = self._find()
        if info is not None and info.size == self._size and info != self._before:
            return info
        raise error

    def _find(self) -> FileInfo | None:
        try:
            return self._stat()
        except NotFound:
            return None


class ObjectWriter(Upload):
    """An upload by obstore, which sends and repeats parts itself; one plain PUT if it fits into a part.

    What was sent before an `abort`, or before the process is killed, stays in the store unseen: Azure drops it after a week, and a
    lifecycle rule (`AbortIncompleteMultipartUpload`) does so on Google Cloud Storage.

    Args:
        path: key in the bucket.
        buffer_bytes: memory for parts, filling and under way.
    """

    def __init__(
        self,
        connection: Connection,
        path: str,
        stat: Callable[[], FileInfo],
        *,
        uri: str,
        size: int,
        buffer_bytes: int,
    ) -> None:
        import obstore

        super().__init__(stat, uri=uri, size=size)
        self._connection = connection
        part = part_bytes(size, buffer_bytes)
        self._file: WritableFile | None = obstore.open_writer(
            connection.uploads, path, buffer_size=part, max_concurrency=max(1, buffer_bytes // part - 1)
        )

    def abort(self) -> None:
        self._close()

    def _take(self, view: memoryview) -> None:
        # A copy: obstore keeps what it is given until it is sent, and the caller's buffer is filled again before that.
        data = bytes(view)
        self._ask(lambda file: file.write(data))

    def _finish(self) -> None:
        self._ask(lambda file: file.close())

    def _close(self) -> None:
        self._open, self._file = False, None  # one that is not closed is never seen

    def _ask(self, ask: Callable[[WritableFile], object]) -> None:
        """Call obstore once, as nobody knows how much of it was done.

        Raises:
            TransientStorageError: if the upload, begun anew, may succeed.
        """
        file, begun = self._file, self._connection.pace.wait_for_turn()
        if file is None:
            raise StorageError(f"{self._uri}: the upload was given up")
        try:
            ask(file)
        except Exception as error:
            translated = translate(error, self._uri, self._connection)
            if isinstance(translated, SlowDown):
                self._connection.pace.refused(begun)
            raise translated from error


def part_bytes(size: int, buffer_bytes: int) -> int:
    """Size of the parts of an upload: as large as its size and memory allow, and no upload has more parts than S3 takes.

    Args:
        size: of the object.
        buffer_bytes: for the part that is filled and those that are under way.
    """
    share = buffer_bytes // (PARTS_IN_FLIGHT + 1)
    return max(LEAST_PART_BYTES, min(LARGEST_PART_BYTES, share, size // FEWEST_PARTS), -(-size // MAX_PARTS))

"""S3 and everything that speaks its language."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from typing_extensions import Buffer

from expo_ray.errors import AlreadyExists, InputChanged, NotFound, StorageError
from expo_ray.storage.protocol import FileInfo
from expo_ray.storage.retry import read_agreed, retry_transient
from expo_ray.storage.s3_connection import connect
from expo_ray.storage.s3_errors import status_of, translate
from expo_ray.storage.uri import check_key, split_bucket

if TYPE_CHECKING:
    from obstore import Bytes, GetOptions, ObjectMeta

PART_BYTES = 8 << 20
MAX_PARTS = 10_000
PARTS_IN_FLIGHT = 4

T = TypeVar("T")


class S3Store:
    """A folder of a bucket.

    Args:
        uri: `s3://bucket` or `s3://bucket/folder`.
    """

    chunk_bytes = 4 << 20
    concurrency = 8

    def __init__(self, uri: str) -> None:
        bucket, folder = split_bucket(uri.removeprefix("s3://"))
        if not bucket:
            raise StorageError(f"{uri}: the bucket is missing; write s3://bucket/folder")
        self.uri = f"s3://{bucket}/{folder}".rstrip("/")
        self._folder = f"{folder}/" if folder else ""
        self._connection = connect(bucket)

    def __reduce__(self) -> tuple[type[S3Store], tuple[str]]:
        return S3Store, (self.uri,)

    @property
    def _guarded(self) -> bool:
        """Whether TLS guards what is read; if not, every range is read twice."""
        return self._connection.guarded

    def list(self, prefix: str = "") -> list[FileInfo]:
        import obstore

        # obstore lists by whole path segments; the protocol by characters.
        folder = (self._folder + prefix).rpartition("/")[0]
        uri = f"{self.uri}/{prefix}".rstrip("/")

        def ask() -> list[FileInfo]:
            pages = obstore.list(self._connection.reads, folder or None, chunk_size=1000)
            return [self._info(meta) for page in pages for meta in page]

        found = self._retry(ask, uri)
        return sorted(
            (info for info in found if info.key and info.key.startswith(prefix)), key=lambda info: info.key
        )

    def stat(self, key: str) -> FileInfo:
        import obstore

        path = self._path(key)
        return self._retry(
            lambda: self._info(obstore.head(self._connection.reads, path)), f"{self.uri}/{key}"
        )

    def read(self, key: str) -> bytes:
        return bytes(self._get(key, {}))

    def read_into(self, key: str, start: int, out: memoryview, *, etag: str) -> None:
        view = out.cast("B")
        if not view:
            return
        data = self._get(key, {"range": (start, start + len(view)), "if_match": etag})
        if len(data) < len(view):
            raise StorageError(
                f"{self.uri}/{key} ends at byte {start + len(data)}, before byte {start + len(view)}"
            )
        view[:] = memoryview(data)

    def put(self, key: str, data: bytes) -> FileInfo:
        import obstore

        path = self._path(key)

        def ask() -> FileInfo:
            result = obstore.put(self._connection.puts, path, data, use_multipart=False)
            return FileInfo(key, len(data), result["e_tag"] or "")

        return self._retry(ask, f"{self.uri}/{key}")

    def put_if_absent(self, key: str, data: bytes) -> FileInfo:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        path = self._path(key)

        def ask() -> FileInfo | None:
            try:
                result = obstore.put(self._connection.puts, path, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return None
            return FileInfo(key, len(data), result["e_tag"] or "")

        written = self._retry(ask, f"{self.uri}/{key}")
        if written is None and self.read(key) != data:
            raise AlreadyExists(f"{self.uri}/{key} already holds something else")
        return written or self.stat(key)

    def writer(self, key: str, size: int) -> S3Writer:
        return S3Writer(self, key, self._path(key), size)

    def delete(self, key: str) -> None:
        import obstore

        path = self._path(key)
        with contextlib.suppress(NotFound):
            self._retry(lambda: obstore.delete(self._connection.puts, path), f"{self.uri}/{key}")

    def _get(self, key: str, options: GetOptions) -> Bytes:
        import obstore
        from obstore.exceptions import PreconditionError

        path = self._path(key)
        uri = f"{self.uri}/{key}"

        def ask() -> Bytes:
            try:
                return obstore.get(self._connection.reads, path, options=options).bytes()
            except PreconditionError as error:
                raise InputChanged(f"{uri} was replaced since it was planned; plan again") from error
            except Exception as error:
                if status_of(error) == 416:
                    raise StorageError(f"{uri} ends before the range {options.get('range')}") from error
                raise

        def fetch() -> Bytes:
            return self._retry(ask, uri)

        return fetch() if self._guarded else read_agreed(fetch, uri)

    def _retry(self, ask: Callable[[], T], uri: str) -> T:
        """`ask()`, transient failures asked again, obstore's errors turned into ours."""

        def translated() -> T:
            try:
                return ask()
            except StorageError:
                raise
            except Exception as error:
                raise translate(error, uri, self._connection) from error

        return retry_transient(translated)

    def _info(self, meta: ObjectMeta) -> FileInfo:
        return FileInfo(meta["path"].removeprefix(self._folder), meta["size"], meta["e_tag"] or "")

    def _path(self, key: str) -> str:
        return self._folder + check_key(key, self.uri)


class S3Writer:
    """A multipart upload, `PARTS_IN_FLIGHT` parts at a time; one plain PUT if it fits into a part."""

    def __init__(self, store: S3Store, key: str, path: str, size: int) -> None:
        import obstore

        self._store = store
        self._key = key
        self._uri = f"{store.uri}/{key}"
        self._size = size
        self._written = 0
        self._open = True
        self._before = self._find()
        self._file = obstore.open_writer(
            store._connection.parts,
            path,
            buffer_size=max(PART_BYTES, -(-size // MAX_PARTS)),
            max_concurrency=PARTS_IN_FLIGHT,
        )

    def write(self, data: Buffer) -> None:
        # A copy, for obstore reads the buffer later, while a part is sent.
        piece = bytes(data)
        if self._written + len(piece) > self._size:
            raise StorageError(f"{self._uri}: more than the {self._size} bytes announced")
        try:
            self._file.write(piece)
        except Exception as error:
            raise translate(error, self._uri, self._store._connection) from error
        self._written += len(piece)

    def commit(self) -> FileInfo:
        if self._written != self._size:
            raise StorageError(f"{self._uri}: {self._written} bytes written, {self._size} announced")
        self._open = False
        try:
            self._file.close()
        except Exception as error:
            return self._landed_nevertheless(translate(error, self._uri, self._store._connection))
        found = self._store.stat(self._key)
        if found.size != self._size:
            raise StorageError(f"{self._uri} has {found.size} bytes after an upload of {self._size}")
        return found

    def abort(self) -> None:
        if not self._open:
            return
        self._open = False
        # obstore aborts the upload where a `with` block is left by an error, and only there.
        with contextlib.suppress(Exception):
            self._file.__exit__(RuntimeError, RuntimeError("aborted"), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _landed_nevertheless(self, error: StorageError) -> FileInfo:
        """The object, if only the acknowledgement of the upload was lost; obstore asked again and was told `NoSuchUpload`."""
        found = self._find()
        if found is not None and found.size == self._size and found != self._before:
            return found
        raise error

    def _find(self) -> FileInfo | None:
        try:
            return self._store.stat(self._key)
        except NotFound:
            return None

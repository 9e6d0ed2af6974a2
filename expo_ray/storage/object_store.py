"""Buckets of a cloud, through obstore: what S3, Google Cloud Storage and Azure Blob Storage have in common."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar, TypeVar

from expo_ray.errors import (
    AlreadyExists,
    InputChanged,
    NotFound,
    SlowDown,
    StorageError,
    TransientStorageError,
)
from expo_ray.storage.checksums import Checksum
from expo_ray.storage.connection import Connection
from expo_ray.storage.object_errors import status_of, translate
from expo_ray.storage.object_writer import ObjectWriter
from expo_ray.storage.protocol import BUFFER_BYTES, MOST_BYTES, FileInfo, Writer, check_size
from expo_ray.storage.retry import copy_pieces, equal_pieces, read_agreed, reads_twice, retry_translated
from expo_ray.storage.uri import Scheme, check_key, split_bucket
from expo_ray.text import shown

if TYPE_CHECKING:
    from obstore import ObjectMeta

PIECE_BYTES = 256 << 10
RANGE_NOT_SATISFIABLE = 416

# More than any model or run has; a listing that goes on is no listing.
_MOST_OBJECTS = 1_000_000

T = TypeVar("T")


class ObjectStore(ABC):
    """A folder of a bucket.

    Args:
        uri: `<scheme>://bucket` or `<scheme>://bucket/folder`.

    Attributes:
        scheme: of its URIs.
    """

    scheme: ClassVar[Scheme]

    local_path: Path | None = None
    chunk_bytes = 8 << 20
    concurrency = 8

    def __init__(self, uri: str) -> None:
        bucket, folder = split_bucket(uri.removeprefix(f"{self.scheme}://"))
        if not bucket:
            raise StorageError(f"{uri}: the bucket is missing; write {self.scheme}://bucket/folder")
        self.uri = f"{self.scheme}://{bucket}/{folder}".rstrip("/")
        self._folder = f"{folder}/" if folder else ""
        self._connection = self._connect(bucket)

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        return type(self), (self.uri,)

    @abstractmethod
    def _connect(self, bucket: str) -> Connection:
        """The connection of this process to a bucket; no request is sent to it yet.

        Raises:
            StorageError: without usable credentials or settings.
        """

    @property
    def guarded(self) -> bool:
        """True if TLS guards what is read; if not, every range is read twice."""
        return self._connection.guarded

    def list(self, prefix: str = "") -> list[FileInfo]:
        import obstore

        # obstore lists by whole path segments; the protocol by characters.
        folder = (self._folder + prefix).rpartition("/")[0]
        uri = f"{self.uri}/{prefix}".rstrip("/")

        def ask() -> list[FileInfo]:
            listed: dict[str, FileInfo] = {}
            for page in obstore.list(self._connection.reads, folder or None, chunk_size=1000):
                for info in map(self._info, page):
                    if info.key in listed or len(listed) == _MOST_OBJECTS:
                        raise StorageError(
                            f"{uri}: the listing does not end; after {len(listed)} objects it names {shown(info.key)}. Correct "
                            f"{self._connection.cloud.endpoint}, or name a folder with fewer files"
                        )
                    listed[info.key] = info
            return list(listed.values())

        infos = self._retry(ask, uri)
        folders = {str(folder) for info in infos for folder in PurePosixPath(info.key).parents}
        return sorted(
            # An empty object `folder/` is how consoles make a folder.
            (
                info
                for info in infos
                if info.key and info.key.startswith(prefix) and (info.size or info.key not in folders)
            ),
            key=lambda info: info.key,
        )

    def stat(self, key: str) -> FileInfo:
        import obstore

        path = self._path(key)
        return self._retry(
            lambda: self._info(obstore.head(self._connection.reads, path)), f"{self.uri}/{key}"
        )

    def read(self, key: str, *, most_bytes: int = MOST_BYTES) -> bytes:
        import obstore

        path = self._path(key)
        uri = f"{self.uri}/{key}"

        def ask() -> bytes:
            answer = obstore.get(self._connection.reads, path)
            check_size(uri, answer.meta["size"], most_bytes)
            return bytes(answer.bytes())

        return self._agreed(ask, lambda data: self._retry(ask, uri) == data, uri)

    def read_into(self, key: str, start: int, out: memoryview, *, etag: str, once: bool = False) -> None:
        path = self._path(key)
        uri = f"{self.uri}/{key}"
        view = out.cast("B")
        if not view:
            return

        fetch = partial(self._range, path, start, len(view), etag, uri)
        if once and not reads_twice():
            self._retry(lambda: copy_pieces(fetch(), view, uri), uri)
            return
        self._agreed(
            lambda: copy_pieces(fetch(), view, uri),
            lambda _: self._retry(lambda: equal_pieces(fetch(), view), uri),
            uri,
        )

    def checksum(self, info: FileInfo) -> Checksum | None:
        """None: obstore shows no checksum of an object."""
        return None

    def put(self, key: str, data: bytes) -> FileInfo:
        import obstore

        path = self._path(key)

        def ask() -> FileInfo:
            result = obstore.put(self._connection.puts, path, data, use_multipart=False)
            return FileInfo(key, len(data), _quoted(result["e_tag"]))

        return self._retry(ask, f"{self.uri}/{key}")

    def put_if_absent(self, key: str, data: bytes) -> FileInfo:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        path = self._path(key)

        def ask() -> FileInfo:
            try:
                result = obstore.put(self._connection.puts, path, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return self._taken(key, data)
            return FileInfo(key, len(data), _quoted(result["e_tag"]))

        return self._retry(ask, f"{self.uri}/{key}")

    def writer(self, key: str, size: int, *, buffer_bytes: int = BUFFER_BYTES) -> Writer:
        connection, uri = self._connection, f"{self.uri}/{key}"
        return ObjectWriter(
            connection, self._path(key), lambda: self.stat(key), uri=uri, size=size, buffer_bytes=buffer_bytes
        )

    def delete(self, key: str) -> None:
        import obstore

        path = self._path(key)
        with contextlib.suppress(NotFound):
            self._retry(lambda: obstore.delete(self._connection.puts, path), f"{self.uri}/{key}")

    def _taken(self, key: str, data: bytes) -> FileInfo:
        """Return the object that kept us from writing, if it holds the same bytes."""
        uri = f"{self.uri}/{key}"
        try:
            held = self.read(key)
        except NotFound as error:  # AWS answers 409 while another request to this key is under way
            raise TransientStorageError(f"{uri}: another writer was at it, and left nothing") from error
        if held != data:
            raise AlreadyExists(f"{uri} already holds something else")
        return self.stat(key)

    def _range(self, path: str, start: int, size: int, etag: str, uri: str) -> Iterable[bytes]:
        """Fetch a range in pieces, as it arrives: eight whole ranges in flight would take 30 MiB more, and no less time."""
        import obstore
        from obstore.exceptions import PreconditionError

        try:
            answer = obstore.get(
                self._connection.reads, path, options={"range": (start, start + size), "if_match": etag}
            )
        except PreconditionError as error:
            obstore.head(self._connection.reads, path)  # Azurite answers so for what is gone, too
            raise InputChanged(f"{uri} was replaced since it was planned; plan again") from error
        except Exception as error:
            if status_of(error) == RANGE_NOT_SATISFIABLE:
                raise StorageError(f"{uri} ends before byte {start}") from error
            raise
        if not same_etag(answer.meta["e_tag"], etag):  # not every store looks at If-Match
            raise InputChanged(f"{uri} was replaced since it was planned; plan again")
        end = answer.range[1]
        if end < start + size:
            raise StorageError(f"{uri} ends at byte {end}, before byte {start + size}")
        return answer.stream(min_chunk_size=PIECE_BYTES)

    def _agreed(self, ask: Callable[[], T], agrees: Callable[[T], bool], uri: str) -> T:
        def read() -> T:
            return self._retry(ask, uri)

        return read() if self.guarded else read_agreed(read, agrees, uri)

    def _retry(self, ask: Callable[[], T], uri: str) -> T:
        def translated(error: Exception) -> StorageError:
            said = translate(error, uri, self._connection)
            if isinstance(said, SlowDown):
                said.retry_after_s = self._retry_after_s(uri)
            return said

        return retry_translated(ask, translated, self._connection.pace)

    def _retry_after_s(self, uri: str) -> float:
        """Seconds after which the store wants to be asked again; 0 where nothing says."""
        return 0.0

    def _info(self, meta: ObjectMeta) -> FileInfo:
        return FileInfo(meta["path"].removeprefix(self._folder), meta["size"], _quoted(meta["e_tag"]))

    def _path(self, key: str) -> str:
        return self._folder + check_key(key, self.uri)


def same_etag(answered: str | None, planned: str) -> bool:
    """True if two ETags name the same bytes; a proxy that compresses marks them as weak."""
    return (answered or "").removeprefix("W/") == planned.removeprefix("W/")


def _quoted(etag: str | None) -> str:
    """An ETag as requests name it; Azure's listings leave the quotation marks out."""
    return f'"{etag}"' if etag and etag[0] not in '"W' else etag or ""

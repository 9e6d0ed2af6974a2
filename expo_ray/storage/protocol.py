"""The one protocol that local folders, S3, the Hub and the in-memory twin speak."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from typing_extensions import Buffer

from expo_ray.errors import AlreadyExists, StorageError
from expo_ray.storage.checksums import Checksum

# Key prefix of probe objects; a killed job may leave one behind. They are no part of a model.
PROBE_PREFIX = ".expo/probe-"
# What `Store.read` takes into memory unless its caller says otherwise.
MOST_BYTES = 2**30
# Memory that a writer holds unless its caller says otherwise.
BUFFER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A stored object as it was when last seen.

    Attributes:
        key: path below the store's folder, parts joined by `/`.
        size: length in bytes.
        etag: names these bytes: S3's ETag, `mtime_ns-size` of a local file, the digest or blob id on the Hub.
        fault: why this entry cannot be used as a file: it is a FIFO, a dangling link, a link that leads elsewhere, or
            has a name that no key can hold. Empty for everything else; only local folders have such entries.
    """

    key: str
    size: int
    etag: str
    fault: str = ""


def check_size(uri: str, size: int, most_bytes: int) -> None:
    """Refuse an object that is too large to be read whole.

    Raises:
        StorageError: if `size` is more than `most_bytes`.
    """
    if size > most_bytes:
        raise StorageError(
            f"{uri}: {size} bytes, more than the {most_bytes} that such a file can have; put the right file in its place"
        )


class Writer(Protocol):
    """A file being written front to back; it is invisible until `commit`.

    As a context manager it aborts on the way out unless it was committed.
    """

    def write(self, data: Buffer) -> None:
        """Append `data`; returns when the buffer may be reused."""

    def commit(self) -> FileInfo:
        """Make the file visible and durable.

        Raises:
            StorageError: if the bytes written are not the size announced.
        """

    def abort(self) -> None:
        """Drop what was written: no file, no temp file, no pending multipart upload. Harmless after `commit`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class Store(Protocol):
    """A folder of objects. Keys are relative; methods are safe to call from several threads.

    Every method raises `NotFound`, `TransientStorageError` (after its own retries) or `StorageError`, with the object's URI in
    the text. Stores pickle as their URI, so a Ray worker opens its own connection.

    Attributes:
        uri: the folder, without a trailing slash and without credentials.
        chunk_bytes: size of a read that saturates the store.
        concurrency: number of such reads in flight that saturates it.
        local_path: the folder on this machine; None for a store whose files have to be fetched.
        guarded: true if nothing can change what is read on its way unnoticed.
    """

    uri: str
    chunk_bytes: int
    concurrency: int
    local_path: Path | None

    @property
    def guarded(self) -> bool: ...

    def list(self, prefix: str = "") -> list[FileInfo]:
        """Every object whose key starts with `prefix`, at any depth, sorted by key; empty if there is none."""

    def stat(self, key: str) -> FileInfo:
        """Size and ETag of one object."""

    def read(self, key: str, *, most_bytes: int = MOST_BYTES) -> bytes:
        """The whole of a small object.

        Raises:
            StorageError: if it is larger than `most_bytes`; nothing of it is then kept.
        """

    def read_into(self, key: str, start: int, out: memoryview, *, etag: str, once: bool = False) -> None:
        """Fill `out` with the bytes from `start` on, of the version `etag` and no other.

        Args:
            once: do not read a second time what no TLS guards: the caller looks at checksums. `EXPO_RAY_READ_TWICE` overrules it.

        Raises:
            InputChanged: if the object is no longer that version.
            StorageError: if the object ends early.
        """

    def checksum(self, info: FileInfo) -> Checksum | None:
        """The store's own checksum of a whole object; None if it keeps none that checksums of ranges combine into."""

    def put(self, key: str, data: bytes) -> FileInfo:
        """Write a small object in one piece, over whatever is there."""

    def put_if_absent(self, key: str, data: bytes) -> FileInfo:
        """Write a small object in one piece unless its key is taken; atomic against every other writer.

        A key that already holds the same bytes counts as written: it is our own write whose acknowledgement was lost, or that
        of a concurrent run of the same plan.

        Raises:
            AlreadyExists: if the key holds other bytes.
        """

    def writer(self, key: str, size: int, *, buffer_bytes: int = BUFFER_BYTES) -> Writer:
        """Begin an object of exactly `size` bytes.

        Args:
            buffer_bytes: memory that the writer may hold; a store that sends parts makes them as large as that allows.
        """

    def delete(self, key: str) -> None:
        """Remove one object; a missing one is no error."""


def check_conditional_writes(store: Store) -> None:
    """Check that `put_if_absent` refuses a key that is taken, which a client cannot enforce; two jobs with one output rely on it.

    Writes a probe object beside the outputs, twice, and removes it.

    Raises:
        StorageError: if the store accepted the second write, or cannot be written at all.
    """
    key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
    try:
        store.put_if_absent(key, b"first")
        store.put_if_absent(key, b"second")
    except AlreadyExists:
        return
    finally:
        store.delete(key)
    raise StorageError(
        f"{store.uri}: this store ignores `If-None-Match: *` and let a second writer overwrite the first; two jobs could mix their "
        "outputs unnoticed. Use a store with conditional writes (AWS S3, MinIO, Ceph, R2, SeaweedFS do) or a local folder"
    )

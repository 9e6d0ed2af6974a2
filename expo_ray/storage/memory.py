"""The in-memory twin of a store, for tests: `memory://name/folder`, one set of objects per name and process."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from pathlib import Path

from typing_extensions import Buffer

from expo_ray.errors import AlreadyExists, InputChanged, NotFound, StorageError
from expo_ray.storage.checksums import Checksum
from expo_ray.storage.protocol import BUFFER_BYTES, MOST_BYTES, FileInfo, Writer, check_size
from expo_ray.storage.uri import check_key, split_bucket

_OBJECTS: dict[str, dict[str, bytes]] = defaultdict(dict)
_LOCK = threading.Lock()


class MemoryStore:
    """Objects of this process; what other stores do with bytes, this one does with a dict.

    Args:
        uri: `memory://name` or `memory://name/folder`.
    """

    local_path: Path | None = None
    chunk_bytes = 1 << 20
    concurrency = 2
    guarded = True

    def __init__(self, uri: str) -> None:
        name, folder = split_bucket(uri.removeprefix("memory://"))
        if not name:
            raise StorageError(f"{uri}: the name is missing; write memory://name/folder")
        self.uri = f"memory://{name}/{folder}".rstrip("/")
        self._folder = f"{folder}/" if folder else ""
        self._objects = _OBJECTS[name]

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[str]]:
        return MemoryStore, (self.uri,)

    def list(self, prefix: str = "") -> list[FileInfo]:
        start = len(self._folder)
        with _LOCK:
            matching = [
                (path, data) for path, data in self._objects.items() if path.startswith(self._folder + prefix)
            ]
        return sorted((_info(path[start:], data) for path, data in matching), key=lambda info: info.key)

    def stat(self, key: str) -> FileInfo:
        return _info(key, self.read(key))

    def read(self, key: str, *, most_bytes: int = MOST_BYTES) -> bytes:
        try:
            data = self._objects[self._path(key)]
        except KeyError:
            raise NotFound(f"{self.uri}/{key}: no such object") from None
        check_size(f"{self.uri}/{key}", len(data), most_bytes)
        return data

    def read_into(self, key: str, start: int, out: memoryview, *, etag: str, once: bool = False) -> None:
        data = self.read(key)
        if _info(key, data).etag != etag:
            raise InputChanged(f"{self.uri}/{key} was replaced since it was planned; plan again")
        if start + len(out) > len(data):
            raise StorageError(f"{self.uri}/{key} ends at byte {len(data)}, before byte {start + len(out)}")
        out[:] = data[start : start + len(out)]

    def checksum(self, info: FileInfo) -> Checksum | None:
        return None

    def put(self, key: str, data: bytes) -> FileInfo:
        with _LOCK:
            self._objects[self._path(key)] = bytes(data)
        return _info(key, data)

    def put_if_absent(self, key: str, data: bytes) -> FileInfo:
        with _LOCK:
            held = self._objects.setdefault(self._path(key), bytes(data))
        if held != data:
            raise AlreadyExists(f"{self.uri}/{key} already holds something else")
        return _info(key, data)

    def writer(self, key: str, size: int, *, buffer_bytes: int = BUFFER_BYTES) -> MemoryWriter:
        check_key(key, self.uri)
        return MemoryWriter(self, key, size)

    def delete(self, key: str) -> None:
        with _LOCK:
            self._objects.pop(self._path(key), None)

    def _path(self, key: str) -> str:
        return self._folder + check_key(key, self.uri)


class MemoryWriter(Writer):
    """Gathers the bytes, and puts them at `commit`."""

    def __init__(self, store: MemoryStore, key: str, size: int) -> None:
        self._store = store
        self._key = key
        self._size = size
        self._data = bytearray()

    def write(self, data: Buffer) -> None:
        self._data += data
        if len(self._data) > self._size:
            raise StorageError(f"{self._store.uri}/{self._key}: more than the {self._size} bytes announced")

    def commit(self) -> FileInfo:
        if len(self._data) != self._size:
            raise StorageError(
                f"{self._store.uri}/{self._key}: {len(self._data)} bytes written, {self._size} announced"
            )
        return self._store.put(self._key, bytes(self._data))

    def abort(self) -> None:
        self._data.clear()


def _info(key: str, data: bytes) -> FileInfo:
    return FileInfo(key, len(data), hashlib.sha256(data).hexdigest())

"""A folder of the local file system, with the promises of an object store: whole files or none, and durable once named."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from expo_ray.errors import AlreadyExists, InputChanged, NotFound, StorageError
from expo_ray.storage.local_writer import TEMP_PREFIX, LocalWriter, etag_of, info_of, named
from expo_ray.storage.protocol import FileInfo
from expo_ray.storage.uri import check_key, check_name


class LocalStore:
    """A local folder; it need not exist until something is written.

    Args:
        uri: a path, absolute or relative to the current folder, `~` allowed, or `file:///path`.

    Attributes:
        uri: the absolute path.
    """

    # In chunks of this size the data stays in the processor's cache between reading and computing: 1.2 s, where chunks of 4 MiB
    # took 2.4 s.
    chunk_bytes = 1 << 20
    concurrency = 2

    def __init__(self, uri: str) -> None:
        path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
        if uri.startswith("file://") and not path.startswith("/"):
            raise StorageError(f"{uri}: a file URI names an absolute path, file:///folder")
        self._root = Path(os.path.abspath(os.path.expanduser(check_name(path))))
        self.uri = str(self._root)

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str]]:
        return LocalStore, (self.uri,)

    def list(self, prefix: str = "") -> list[FileInfo]:
        if prefix:
            check_key(prefix.rstrip("/"), self.uri)
        folder = self._root / prefix.rpartition("/")[0]
        found = []
        with named(folder):
            for path in _files(folder):
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, or a link to nowhere
                        found.append(info_of(key, path.stat()))
        return sorted(found, key=lambda info: info.key)

    def stat(self, key: str) -> FileInfo:
        path = self._path(key)
        with named(path):
            if path.is_dir():
                raise NotFound(f"{path}: a folder, not a file")
            return info_of(key, path.stat())

    def read(self, key: str) -> bytes:
        path = self._path(key)
        with named(path):
            return path.read_bytes()

    def read_into(self, key: str, start: int, out: memoryview, *, etag: str) -> None:
        path = self._path(key)
        with named(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                filled = fill(fd, start, out)
                found = os.fstat(fd)
            finally:
                os.close(fd)
        # Looked at after reading, so that a file rewritten during the read is found out as well.
        if etag_of(found) != etag:
            raise InputChanged(f"{path} was replaced since it was planned; plan again")
        if filled < out.nbytes:
            raise StorageError(f"{path} ends at byte {found.st_size}, before byte {start + out.nbytes}")

    def put(self, key: str, data: bytes) -> FileInfo:
        with self.writer(key, len(data)) as writer:
            writer.write(data)
            return writer.commit()

    def put_if_absent(self, key: str, data: bytes) -> FileInfo:
        path = self._path(key)
        with LocalWriter(path, key, len(data)) as writer:
            writer.write(data)
            try:
                return writer.commit_if_absent()
            except FileExistsError:
                if self.read(key) != data:
                    raise AlreadyExists(f"{path} already holds something else") from None
        return self.stat(key)

    def writer(self, key: str, size: int) -> LocalWriter:
        return LocalWriter(self._path(key), key, size)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with named(path), contextlib.suppress(FileNotFoundError):
            path.unlink()

    def _path(self, key: str) -> Path:
        return self._root / check_key(key, self.uri)


def _files(folder: Path) -> Iterator[Path]:
    """Every file below, not our own temp files; a missing folder has none."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for parent, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            if not name.startswith(TEMP_PREFIX):
                yield Path(parent, name)


def fill(fd: int, start: int, out: memoryview) -> int:
    """Read from byte `start` of an open file into `out`; the number of bytes read is short only at the end of the file."""
    view = out.cast("B")
    filled = 0
    while filled < len(view):
        count = os.preadv(fd, [view[filled:]], start + filled)
        if count == 0:
            break
        filled += count
    return filled

"""A file of the local file system being written: whole or not there, and durable once it has its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from typing_extensions import Buffer

from expo_ray.errors import NotFound, StorageError
from expo_ray.storage.protocol import FileInfo, Writer

TEMP_PREFIX = ".partial-"
# From this size on, a write goes past the page cache (O_DIRECT): 0.09 s of CPU time for 2 GiB, where memory for the page cache
# alone costs 0.5 to 5 s, and nothing is left for the final fsync to wait for.
DIRECT_BYTES = 256 << 10
# What the file's position, the length and the address of a direct write must be multiples of.
_BLOCK = 4096

_REMEDIES = {
    errno.ENOSPC: "free space there, or choose another output",
    errno.EDQUOT: "the quota is used up: free space, or choose another output",
    errno.EFBIG: "this process or file system forbids files of that size; choose another output or a smaller shard size",
    errno.EROFS: "choose an output on a writable file system",
    errno.EACCES: "give this user the right to it, or choose another folder",
    errno.EPERM: "give this user the right to it, or choose another folder",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EISDIR: "it is a folder; choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
}


class LocalWriter(Writer):
    """A temp file beside its goal, renamed onto it once it is on disk.

    It is locked while it is open, so that the next writer in the folder can tell what a killed process left behind.
    """

    def __init__(self, path: Path, key: str, size: int) -> None:
        self._path = path
        self._key = key
        self._size = size
        self._written = 0
        self._direct = hasattr(os, "O_DIRECT")
        self._temp: Path | None = path.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}")
        with named(path):
            _make_folder(path.parent)
            _remove_abandoned(path.parent)
            self._fd = _create_locked(self._temp)

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        if self._written + len(view) > self._size:
            raise StorageError(f"{self._path}: more than the {self._size} bytes announced")
        whole = 0 if self._written % _BLOCK else len(view) - len(view) % _BLOCK
        with named(self._path):
            if whole >= DIRECT_BYTES and self._direct:
                view = view[self._write_past_cache(view[:whole]) :]
            while view:
                view = view[self._count(os.write(self._fd, view)) :]

    def _write_past_cache(self, view: memoryview) -> int:
        """Bytes written; none where the file system, or this buffer's address, does not allow it."""
        written = 0
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            while written < len(view) and written % _BLOCK == 0:
                written += self._count(os.write(self._fd, view[written:]))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = False
        finally:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
        return written

    def _count(self, written: int) -> int:
        self._written += written
        return written

    def commit(self) -> FileInfo:
        with named(self._path):
            temp, found = self._sync()
            temp.replace(self._path)
            self._temp = None
            _sync_folder(self._path.parent)
        self.abort()  # closes the file
        return info_of(self._key, found)

    def commit_if_absent(self) -> FileInfo:
        """`commit`, but a file already there stays.

        Raises:
            FileExistsError: if there is one.
        """
        with named(self._path):
            temp, found = self._sync()
            os.link(temp, self._path)
            _sync_folder(self._path.parent)
        return info_of(self._key, found)

    def abort(self) -> None:
        if self._temp is not None:
            self._temp.unlink(missing_ok=True)
            self._temp = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _sync(self) -> tuple[Path, os.stat_result]:
        """The finished temp file, on disk."""
        assert self._temp is not None, "committed or aborted before"
        if self._written != self._size:
            raise StorageError(f"{self._path}: {self._written} bytes written, {self._size} announced")
        os.fsync(self._fd)
        return self._temp, os.fstat(self._fd)


def _create_locked(temp: Path) -> int:
    while True:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # removed as abandoned between its making and its lock


def _remove_abandoned(folder: Path) -> None:
    """Delete the temp files of processes that were killed: those that nobody has locked."""
    for temp in folder.glob(f"{TEMP_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(temp, os.O_WRONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temp.unlink()
            finally:
                os.close(fd)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that names `path` and a remedy; FileExistsError passes."""
    try:
        yield
    except FileExistsError:
        raise
    except FileNotFoundError as error:
        raise NotFound(f"{path}: no such file or folder") from error
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        raise StorageError(f"{path}: {error.strerror}" + (f"; {remedy}" if remedy else "")) from error


def _make_folder(folder: Path) -> None:
    """`mkdir -p`, with each new entry on disk, so that a file synced into it cannot lose its folder."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def etag_of(found: os.stat_result) -> str:
    """Names one version of a file."""
    return f"{found.st_mtime_ns}-{found.st_size}"


def info_of(key: str, found: os.stat_result) -> FileInfo:
    """What a store tells of a file."""
    return FileInfo(key, found.st_size, etag_of(found))

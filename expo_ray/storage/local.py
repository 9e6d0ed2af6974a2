"""A folder of the local file system, with the promises of an object store: whole files or none, and durable once named."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from expo_ray.errors import AlreadyExists, InputChanged, NotFound, StorageError
from expo_ray.storage.checksums import Checksum
from expo_ray.storage.local_writer import TEMP_PREFIX, LocalWriter, etag_of, info_of, named
from expo_ray.storage.protocol import BUFFER_BYTES, MOST_BYTES, FileInfo, check_size
from expo_ray.storage.uri import check_key, local_path
from expo_ray.text import shown


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
    guarded = True

    def __init__(self, uri: str) -> None:
        path = local_path(uri)
        assert path is not None, "a URI of another store"
        self.local_path: Path | None = path
        self._root, self.uri = path, str(path)

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str]]:
        return LocalStore, (self.uri,)

    def list(self, prefix: str = "") -> list[FileInfo]:
        if prefix:
            check_key(prefix.rstrip("/"), self.uri)
        folder = self._root / prefix.rpartition("/")[0]
        real_root = os.path.realpath(self._root)
        infos: list[FileInfo] = []
        with named(folder):
            for path in _entries(folder):
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        infos.append(_listed(key, path, real_root))
        return sorted(infos, key=lambda info: info.key)

    def stat(self, key: str) -> FileInfo:
        path = self._path(key)
        with named(path):
            return info_of(key, _regular(path, _status(path)))

    def read(self, key: str, *, most_bytes: int = MOST_BYTES) -> bytes:
        path = self._path(key)
        with _opened(path) as fd:
            check_size(str(path), os.fstat(fd).st_size, most_bytes)
            with open(fd, "rb", closefd=False) as file:
                data = file.read(most_bytes + 1)
            check_size(str(path), len(data), most_bytes)  # files of /proc have no size, others may grow
        return data

    def read_into(self, key: str, start: int, out: memoryview, *, etag: str, once: bool = False) -> None:
        path = self._path(key)
        with _opened(path) as fd:
            filled = fill(fd, start, out)
            status = os.fstat(fd)
        # Looked at after reading, so that a file rewritten during the read is found out as well.
        if etag_of(status) != etag:
            raise InputChanged(f"{path} was replaced since it was planned; plan again")
        if filled < out.nbytes:
            raise StorageError(f"{path} ends at byte {status.st_size}, before byte {start + out.nbytes}")

    def checksum(self, info: FileInfo) -> Checksum | None:
        return None

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

    def writer(self, key: str, size: int, *, buffer_bytes: int = BUFFER_BYTES) -> LocalWriter:
        return LocalWriter(self._path(key), key, size)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with named(path), contextlib.suppress(FileNotFoundError):
            path.unlink()

    def _path(self, key: str) -> Path:
        return self._root / check_key(key, self.uri)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a regular file. Anything else is refused before it is read: a FIFO would wait for ever.

    Raises:
        NotFound: if there is no such file, or it is a folder.
        StorageError: if it is a FIFO, a socket or a device, or cannot be read.
    """
    with named(path):
        _regular(path, _status(path))  # opening alone makes some devices act
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _regular(path, os.fstat(fd))
            yield fd
        finally:
            os.close(fd)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except NotADirectoryError as error:  # the folder is itself a file
        raise FileNotFoundError(error.errno, error.strerror) from error


def _regular(path: Path, status: os.stat_result) -> os.stat_result:
    if stat.S_ISDIR(status.st_mode):
        raise NotFound(f"{path}: a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(f"{path}: {_kind(status)}, not a file; put a file in its place, or remove it")
    return status


def _kind(status: os.stat_result) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(status.st_mode)), "a device")


def _listed(key: str, path: Path, real_root: str) -> FileInfo:
    """An entry of a listing; `fault` says what is wrong with it."""
    is_link = path.is_symlink()
    target = f"a link to {shown(os.readlink(path))}" if is_link else ""
    try:
        status = path.stat()
    except OSError as error:
        if not is_link:
            raise
        return FileInfo(key, 0, "", f"{target}, which leads nowhere ({os.strerror(error.errno or 0)})")
    if not stat.S_ISREG(status.st_mode):
        kind = _kind(status)
        return FileInfo(key, 0, "", f"{target}, {kind}" if is_link else kind)
    info = info_of(key, status)
    if _unnameable(key):
        return replace(info, fault=_unnameable(key))
    if is_link and not _stays(os.path.realpath(path), real_root):
        return replace(info, fault=f"{target}, outside of this folder")
    return info


def _unnameable(key: str) -> str:
    """Reason that no key can name such a file, empty if one can."""
    try:
        key.encode()
        check_key(key, "")
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    except StorageError:
        return "a backslash or a control character in its name"
    return ""


def _stays(target: str, real_root: str) -> bool:
    """True if the file that a link leads to belongs to the folder: it lies there, or in the cache of a Hub client.

    Snapshots of the Hub's cache link to `models--<org>--<name>/blobs/`, and so did downloads of older clients into other folders.
    """
    if target.startswith(real_root.rstrip("/") + "/"):
        return True
    blobs, snapshots = os.path.dirname(target), os.path.dirname(real_root)
    is_snapshot = os.path.basename(snapshots) == "snapshots"
    return os.path.basename(blobs) == "blobs" and (
        os.path.basename(os.path.dirname(blobs)).startswith("models--")
        or (is_snapshot and os.path.dirname(blobs) == os.path.dirname(snapshots))
    )


def _entries(folder: Path) -> Iterator[Path]:
    """List every file below, and every link to a folder, but not our own temp files; a missing folder has none."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*names, *links):
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

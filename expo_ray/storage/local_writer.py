"""A file of the local file system being written: whole or not there, and durable once it has its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from typing_extensions import Buffer

from expo_ray.errors import NotFound, StorageError
from expo_ray.storage.protocol import FileInfo, Writer

TEMP_PREFIX = ".partial-"
_TEMP_NAME = re.compile(rf"{re.escape(TEMP_PREFIX)}([0-9a-f]{{12}})-[0-9a-f]{{32}}")
_RESERVED = f"{TEMP_PREFIX}reserved-"
# From this size on, a write goes past the page cache (O_DIRECT): 0.09 s of CPU time for 2 GiB, where memory for the page cache
# alone costs 0.5 to 5 s, and nothing is left for the final fsync to wait for.
DIRECT_BYTES = 256 << 10
# What the file's position, the length and the address of a direct write must be multiples of.
_BLOCK = 4096
# What file systems answer to an operation that they do not have: FUSE, SMB, exFAT and sandboxes differ.
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
# The same of `link`, which is only tried beside a file that this process could create: gcsfuse, s3fs, exFAT, Drive.
_NO_LINKS = _UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EIO, errno.EXDEV}
# A folder that may be written but not listed cannot be opened, and some file systems open none.
_NO_FOLDER_SYNC = _UNSUPPORTED | {errno.EBADF, errno.EPERM, errno.EACCES, errno.EISDIR}
# A name is reserved for milliseconds; a reservation this old was left by a process that died.
_RESERVED_S = 60.0
# Locks of many network file systems are unknown to other machines: their temp files are left alone for so long.
_FOREIGN_S = 3600.0

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1

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
    errno.EINVAL: "this file system may not take that name; choose another output",
    errno.EILSEQ: "this file system does not take that name; choose another output",
    errno.EIO: "the disk or the network file system failed; the system's log says more",
    errno.ENOTCONN: "the file system is gone; mount it again",
    errno.ESTALE: "the file system changed underneath; mount it again",
}


class LocalWriter(Writer):
    """A temp file beside its goal, renamed onto it once it is on disk.

    It is locked while it is open, so that the next writer in the folder recognises the file of a killed process.
    """

    def __init__(self, path: Path, key: str, size: int) -> None:
        self._path = path
        self._key = key
        self._size = size
        self._written = 0
        self._direct = hasattr(os, "O_DIRECT")
        self._temp: Path | None = path.with_name(f"{TEMP_PREFIX}{_boot()}-{uuid.uuid4().hex}")
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
        """Write with O_DIRECT and return the number of bytes; 0 where the file system, or this buffer's address, does not allow it."""
        written = 0
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            while written < len(view) and written % _BLOCK == 0:
                written += self._count(os.write(self._fd, view[written:]))
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
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
            temp, status = self._sync()
            temp.replace(self._path)
            self._temp = None
            _sync_folder(self._path.parent)
        self.abort()  # closes the file
        return info_of(self._key, status)

    def commit_if_absent(self) -> FileInfo:
        """`commit`, but a file already there stays. Of several writers, on several machines too, one wins.

        Raises:
            FileExistsError: if there is one.
        """
        with named(self._path):
            temp, status = self._sync()
            _give_new_name(temp, self._path)
            _sync_folder(self._path.parent)
        return info_of(self._key, status)

    def abort(self) -> None:
        if self._temp is not None:
            self._temp.unlink(missing_ok=True)
            self._temp = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _sync(self) -> tuple[Path, os.stat_result]:
        """Write the finished temp file to disk, and return it with its status."""
        assert self._temp is not None, "committed or aborted before"
        if self._written != self._size:
            raise StorageError(f"{self._path}: {self._written} bytes written, {self._size} announced")
        with _tolerated(_UNSUPPORTED):
            os.fsync(self._fd)
        return self._temp, os.fstat(self._fd)


def _create_locked(temp: Path) -> int:
    while True:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.path.lexists(temp):  # not by st_nlink, which is 0 for every file of some FUSE file systems
            return fd
        os.close(fd)  # removed as abandoned between its making and its lock


def _give_new_name(temp: Path, path: Path) -> None:
    """Make the finished `temp` visible as `path` in one step: whole, and only if nothing has that name.

    By a hard link, where the file system has them; else by `renameat2`; else under a reservation, as neither exFAT nor the
    FUSE file systems of object stores have either.

    Raises:
        FileExistsError: if something has the name.
    """
    try:
        os.link(temp, path)
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        _rename_unless_taken(temp, path)
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    with _reserved(path, os.stat(temp).st_mtime):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.rename(temp, path)


def _rename_unless_taken(temp: Path, path: Path) -> None:
    """`renameat2(RENAME_NOREPLACE)`: Linux 3.15 and glibc 2.28, and not every file system."""
    import ctypes  # 10 ms that few file systems cost

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    before, after = os.fsencode(temp), os.fsencode(path)
    if libc.renameat2(_AT_FDCWD, before, _AT_FDCWD, after, _RENAME_NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))


@contextlib.contextmanager
def _reserved(path: Path, now: float) -> Iterator[None]:
    """Hold the only reservation of a name, a file that `O_EXCL` lets one process create.

    Args:
        now: the time by the file system's clock.
    """
    reservation = path.with_name(f"{_RESERVED}{path.name}")
    began = time.monotonic()
    while True:
        try:
            fd = _create_locked(reservation)
            break
        except FileExistsError:
            waited = time.monotonic() - began
            _remove_if_abandoned(reservation, older_than_s=_RESERVED_S, now=now + waited)
            if waited > 2 * _RESERVED_S:
                raise StorageError(
                    f"{path}: another process has reserved this name; if none is at work, delete {reservation}"
                ) from None
            time.sleep(0.02)
    try:
        yield
    finally:
        reservation.unlink(missing_ok=True)
        os.close(fd)


def _remove_abandoned(folder: Path) -> None:
    """Delete the temp files of processes that were killed: those that are not locked.

    Locks may be unknown to other machines, so that a temp file that was begun on another one must be old as well.
    """
    for temp in folder.glob(f"{TEMP_PREFIX}*"):
        made = _TEMP_NAME.fullmatch(temp.name)
        age = (
            _RESERVED_S
            if temp.name.startswith(_RESERVED)
            else _FOREIGN_S
            if made and made[1] != _boot()
            else 0
        )
        _remove_if_abandoned(temp, older_than_s=age, now=time.time())


def _remove_if_abandoned(temp: Path, *, older_than_s: float, now: float) -> None:
    with contextlib.suppress(OSError):
        # Without O_NONBLOCK, a FIFO of that name would wait for a reader.
        fd = os.open(temp, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            state = os.fstat(fd)
            if not stat.S_ISREG(state.st_mode) or (older_than_s and now - state.st_mtime < older_than_s):
                return
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The name may by now be that of its next maker's file, whose lock this one is not.
            if os.path.samestat(os.fstat(fd), os.lstat(temp)):
                temp.unlink()
        finally:
            os.close(fd)


@functools.cache
def _boot() -> str:
    """Name of this running kernel: processes with the same one see each other's locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:12]
    except OSError:
        return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:12]


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
    """Write a folder's entries to disk, as far as its file system can be asked to."""
    with _tolerated(_NO_FOLDER_SYNC):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _tolerated(errors: frozenset[int]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in errors:
            raise


def check_writable(folder: str) -> None:
    """Check, without writing, that files can be written into `folder`, or that it can be made.

    Raises:
        StorageError: with the cause.
    """
    place = folder
    while not os.path.isdir(place):
        if os.path.lexists(place):
            code = errno.ENOTDIR
            break
        place = os.path.dirname(place)
    else:
        if os.access(place, os.W_OK | os.X_OK):
            return
        code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
    with named(Path(folder)):
        raise OSError(code, os.strerror(code))


def free_bytes(folder: str) -> int | None:
    """Bytes that this user may still write there; None where the file system does not say, as many on FUSE do not."""
    state = os.statvfs(folder)
    if not state.f_blocks or (not state.f_bavail and _is_fuse(folder)):
        return None
    return state.f_bavail * (state.f_frsize or state.f_bsize)


def _is_fuse(folder: str) -> bool:
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            words = line.decode(errors="replace").split()  # id, parent, device, ..., "-", type, ...
            if words[2] == number:
                return words[words.index("-") + 1].startswith("fuse")
    return False


def etag_of(status: os.stat_result) -> str:
    """Names one version of a file."""
    return f"{status.st_mtime_ns}-{status.st_size}"


def info_of(key: str, status: os.stat_result) -> FileInfo:
    """The entry of a file in a listing."""
    return FileInfo(key, status.st_size, etag_of(status))

"""Room in this node's cache: what nobody uses makes way for what is fetched, the least recently used first.

A folder of the cache is kept by a lease, a lock that a process holds to its end, however it ends: the kernel releases it. Whoever makes
room does so alone, under a lock of the whole cache, so that two fetches cannot count on the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from expo_ray.config.fields import parse_bytes
from expo_ray.errors import JobError, StorageError
from expo_ray.home import CACHE_VARIABLE, cache_folder
from expo_ray.progress import size_text
from expo_ray.storage.local_writer import free_bytes

SIZE_VARIABLE = "EXPO_RAY_CACHE_SIZE"
# Folders of the cache that hold a model, or the weights of an adapter, each; whatever else lies there is small.
_KINDS = ("models", "adapters")

_LEASE = ".lease"
_EVICTED = ".evicted"
# Leases of this process; an open file each.
_held: dict[Path, IO[str]] = {}


@dataclass(frozen=True)
class _Entry:
    """A folder of the cache.

    Attributes:
        size: bytes that it holds, or will hold once it is fetched.
        present: bytes that it holds now.
        used: when it was last used, in seconds since the epoch.
    """

    folder: Path
    size: int
    present: int
    used: float


def cache_limit() -> int | None:
    """Bytes that the cache may hold, by `EXPO_RAY_CACHE_SIZE`; None if only the disk bounds it.

    Raises:
        JobError: if the variable is no size.
    """
    text = os.environ.get(SIZE_VARIABLE, "")
    try:
        return parse_bytes(text) if text else None
    except ValueError as error:
        raise JobError(f"{SIZE_VARIABLE}: {error}") from error


def lease(folder: Path) -> None:
    """Keep a folder of the cache until this process ends, and mark it as used now; it need not exist yet."""
    if folder not in _held:
        file = _lease_file(folder).open("a+")
        fcntl.flock(file, fcntl.LOCK_SH)  # waits while the folder is being evicted
        _held[folder] = file
    os.utime(_lease_file(folder))


def make_room(folder: Path, size: int) -> None:
    """Evict what nobody uses until `size` bytes can be fetched into `folder`, and reserve them.

    Args:
        folder: of the cache, leased by this process.

    Raises:
        StorageError: if what is in use leaves too little.
    """
    limit = cache_limit()
    with locked(cache_folder() / "room"):
        entries = sorted(_entries(but=folder), key=lambda entry: entry.used)
        while _lacks_room(folder, size, entries, limit):
            evicted = next((entry for entry in entries if _evict(entry.folder)), None)
            if evicted is None:
                raise StorageError(_too_small(folder, size, entries, limit))
            entries.remove(evicted)
        lease_file = _lease_file(folder)
        used = lease_file.stat().st_mtime
        lease_file.write_text(str(size))
        os.utime(lease_file, (used, used))


@contextlib.contextmanager
def locked(name: Path) -> Iterator[None]:
    """Keep other processes of this node away from what `name` stands for.

    `flock` and not a lock file of our making: the kernel releases it when the process that holds it is killed.
    """
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        file = name.with_name(f"{name.name}.lock").open("w")
    except OSError as error:
        raise StorageError(
            f"{name.parent}: {error.strerror}; set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lease_file(folder: Path) -> Path:
    return folder.with_name(folder.name + _LEASE)


def _entries(but: Path) -> Iterator[_Entry]:
    """The folders of the cache, but for one."""
    for kind in _KINDS:
        for folder in (cache_folder() / kind).glob("*"):
            if folder.is_dir() and folder != but and not folder.name.endswith(_EVICTED):
                present = _bytes_in(folder)
                yield _Entry(folder, max(present, _reserved(folder)), present, _last_used(folder))


def _bytes_in(folder: Path) -> int:
    sizes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # evicted or written meanwhile
            sizes += path.lstat().st_size
    return sizes


def _reserved(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(_lease_file(folder).read_text() or 0)
    return 0


def _last_used(folder: Path) -> float:
    """When a folder was last leased; one of an earlier version, which knew no leases, when it was made."""
    for path in (_lease_file(folder), folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return time.time()


def _lacks_room(folder: Path, size: int, entries: list[_Entry], limit: int | None) -> bool:
    if limit is not None and size + sum(entry.size for entry in entries) > limit:
        return True
    free = free_bytes(str(folder.parent))
    return free is not None and size > free - _promised(entries)


def _promised(entries: list[_Entry]) -> int:
    """Bytes that fetches under way will still take. Those of a killed process count until its folder is evicted."""
    return sum(entry.size - entry.present for entry in entries)


def _evict(folder: Path) -> bool:
    """Delete a folder unless a process holds its lease; false if one does."""
    with _lease_file(folder).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Under another name first: a copy that is half deleted must not look like one.
        doomed = folder.with_name(folder.name + _EVICTED)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        file.truncate(0)
        return True


def _too_small(folder: Path, size: int, entries: list[_Entry], limit: int | None) -> str:
    used, free = sum(entry.size for entry in entries), free_bytes(str(folder.parent))
    bound = "" if limit is None else f"{SIZE_VARIABLE} is {size_text(limit)}, "
    disk = "" if free is None else f"{size_text(free)} are free"
    in_use = f", and {size_text(used)} are in use by other engines of this node" if used else ""
    raise_it = f"raise {SIZE_VARIABLE}, " if limit is not None and size + used > limit else "free space, "
    return (
        f"{folder.parent}: {size_text(size)} are to be fetched, {bound}{disk}{in_use}; {raise_it}or set {CACHE_VARIABLE} to a "
        "folder on another disk"
    )

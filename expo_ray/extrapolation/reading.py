"""What a shard has read of its parents, with checksums by which a flipped bit is found once a file has been read whole."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.storage import FileInfo, Store, open_planned
from expo_ray.storage.checksums import Checksum, RangeChecksum, checksum_of, has_awscrt, joined


@dataclass(frozen=True)
class FileRanges:
    """Ranges of a file that were read once.

    Attributes:
        algorithm: of their checksums.
        ranges: by their start; neighbours are one range.
    """

    algorithm: str
    ranges: tuple[RangeChecksum, ...]


@dataclass
class Reading:
    """Reads parents in ranges, each once, and keeps the checksum of each where the store has one of the whole file.

    Methods may be called from several threads.
    """

    _ranges: dict[tuple[str, str], list[RangeChecksum]] = field(default_factory=dict)
    _algorithms: dict[tuple[str, str], str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read_into(self, store: Store, parent: Checkpoint, file: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a parent's file from `start` on.

        Raises:
            InputChanged: if the file is no longer the one that was planned.
            StorageError: if it cannot be read.
        """
        info = parent.files[file]
        store.read_into(file, start, out, etag=info.etag, once=True)
        if known := known_checksum(parent.uri, info):
            part = RangeChecksum(start, start + out.nbytes, checksum_of(known.algorithm, out))
            with self._lock:
                self._algorithms[parent.uri, file] = known.algorithm
                self._ranges.setdefault((parent.uri, file), []).append(part)

    def of(self, parent: Checkpoint) -> Mapping[str, FileRanges]:
        """What was read of a parent's files, by key."""
        return {
            file: FileRanges(algorithm, tuple(joined(algorithm, self._ranges[uri, file])))
            for (uri, file), algorithm in self._algorithms.items()
            if uri == parent.uri
        }


@lru_cache(maxsize=4096)
def known_checksum(uri: str, info: FileInfo) -> Checksum | None:
    """The checksum that the store of a parent keeps of a whole file; None if it keeps none that ranges combine into."""
    return open_planned(uri, {info.key: info}).checksum(info) if has_awscrt() else None

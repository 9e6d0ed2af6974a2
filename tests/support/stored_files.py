"""Folders in memory for tests that read checkpoints."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from expo_ray.storage.memory import MemoryStore
from expo_ray.storage.protocol import FileInfo

_NUMBERS = itertools.count()


class CountingStore(MemoryStore):
    """Also counts the ranged reads and their bytes."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.reads = 0
        self.bytes_read = 0

    def read_into(self, key: str, start: int, out: memoryview, *, etag: str, once: bool = False) -> None:
        self.reads += 1
        self.bytes_read += len(out)
        super().read_into(key, start, out, etag=etag)


def stored(files: Mapping[str, bytes | Mapping[str, Any]]) -> CountingStore:
    """A new folder; a mapping is stored as JSON."""
    store = CountingStore(f"memory://checkpoints/{next(_NUMBERS)}")
    for key, content in files.items():
        store.put(key, content if isinstance(content, bytes) else json.dumps(content).encode())
    return store


def stored_folder(path: Path) -> CountingStore:
    """A copy of a local folder."""
    return stored({str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()})


def info_of(store: MemoryStore, key: str) -> FileInfo:
    return store.stat(key)


def weights(*names: str, shape: tuple[int, ...] = (2, 3)) -> bytes:
    """A safetensors file of float32 tensors, written by the safetensors library."""
    tensors: dict[str, npt.NDArray[Any]] = {
        name: np.full(shape, index, np.float32) for index, name in enumerate(names)
    }
    return save(tensors)

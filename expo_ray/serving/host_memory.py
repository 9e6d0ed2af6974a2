"""Memory of the host: what may still be taken of it, and how a process keeps what it frees."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

# Stays free beside what is taken. Ray kills workers when a twentieth is left (`RAY_memory_usage_threshold`).
KEPT_FREE = 0.1

# Parameters of glibc's `mallopt`.
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1
_LARGEST = 2**31 - 1

# Names of limit, usage and reclaimable page cache, in version 2 and version 1 of control groups.
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def spare_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be taken so that `KEPT_FREE` of each limit stays free; below 0 if less is free already.

    Page cache counts as free, as the kernel gives it up. 0 where the kernel does not say.

    Args:
        root: below which `proc` and `sys` are.
    """
    return int(min((free - KEPT_FREE * total for total, free in _limits(root)), default=0))


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Total and free bytes of the machine, and of each group with a limit."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        machine = _table(root / "proc/meminfo")
        total = 1024 * machine["MemTotal:"]
        yield total, 1024 * machine["MemAvailable:"]
        for folder in _groups(root):
            for names in (_V2, _V1):
                with contextlib.suppress(OSError, KeyError, ValueError):
                    yield from _limit_of(folder, total, *names)


def _limit_of(
    folder: Path, machine: int, limit: str, usage: str, cached: tuple[str, ...]
) -> Iterator[tuple[int, int]]:
    text = (folder / limit).read_text().strip()
    if text != "max" and int(text) < machine:
        reclaimable = _table(folder / "memory.stat")
        used = int((folder / usage).read_text()) - sum(reclaimable[name] for name in cached)
        yield int(text), int(text) - used


def _groups(root: Path) -> Iterator[Path]:
    """Folders of this process's memory groups and of those around them; in a container its own is the root."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in {"", "memory"}:
            mounted = root / "sys/fs/cgroup" / controllers
            group = mounted / path.strip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mounted))


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def keep_freed_memory() -> bool:
    """Let this process keep large blocks that it frees, and use them again; returns True if its C library can.

    glibc gives each large block back to the system, and the next one begins as pages that the kernel has to clear, one fault for
    each 4 KiB. A swap takes and frees as much as the model several times: of 131 ms to pack the weights of SmolLM2, 66 were
    faults, and of 113 ms to copy them, 99.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _LARGEST))


def anonymous_memory(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Memory that goes back to the system once nothing refers to it, in huge pages where the system has them.

    Raises:
        OSError: if there is none.
    """
    mapped = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)[:size]


def pin(memory: torch.Tensor) -> None:
    """Lock memory of the CPU in its place, so that the GPU reads it over the bus. Torch's own allocator would round up to a power of 2.

    Raises:
        OSError: if CUDA cannot.
    """
    import torch

    cuda: Any = torch.cuda.cudart()
    failure = int(cuda.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if failure:
        raise OSError(f"CUDA cannot pin {memory.numel() / 1e9:.1f} GB of host memory (error {failure})")


def unpin(memory: torch.Tensor) -> None:
    """Undo `pin`."""
    import torch

    torch.cuda.synchronize()
    cuda: Any = torch.cuda.cudart()
    cuda.cudaHostUnregister(memory.data_ptr())

"""How far an extrapolation is, in shards and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expo_ray import progress
from expo_ray.progress import clock, size_text
from expo_ray.storage import Store

__all__ = ["Progress", "Snapshot", "clock", "size_text"]

# Below this, only headers may have been written, which tell nothing of the speed.
_TELLING_BYTES = 1_000_000


@dataclass(frozen=True)
class Snapshot:
    """One moment of a job. `seconds_left` is None while next to nothing has been written."""

    shards: int
    shards_done: int
    bytes: int
    bytes_done: int
    seconds: float
    seconds_left: float | None


class Progress(progress.Progress):
    """Told what has been written, by any thread.

    Args:
        status: store that receives `status.json`; None for none.
        quiet: show nothing.
    """

    def __init__(self, status: Store | None = None, *, quiet: bool = False) -> None:
        super().__init__("extrapolate", status, quiet=quiet)
        self._shards = self._shards_done = self._bytes = self._bytes_done = 0

    def begin(self, shards: int, size: int) -> None:
        """Start the clock on `shards` shards of `size` bytes in all."""
        with self._lock:
            self._shards, self._bytes = shards, size
            self._open_bar(size, "B")

    def add(self, written: int) -> None:
        """Count bytes of output."""
        with self._lock:
            self._bytes_done += written
            if self._bar is not None:
                self._bar.update(written)

    def shard_done(self) -> None:
        with self._lock:
            self._shards_done += 1
            if self._bar is not None:
                self._bar.set_postfix_str(f"{self._shards_done}/{self._shards} shards", refresh=False)

    def snapshot(self) -> Snapshot:
        with self._lock:
            seconds, done = self.seconds(), self._bytes_done
            left = seconds * (self._bytes - done) / done if done > _TELLING_BYTES else None
            return Snapshot(self._shards, self._shards_done, self._bytes, done, seconds, left)

    def finish(self, state: str, published: int, failures: Sequence[str] = ()) -> None:
        """Write the last `status.json`, after which it stays as it is."""
        self._write_last(state, {"published": published, "failed": list(failures)})

    @property
    def line(self) -> str:
        now = self.snapshot()
        if not now.shards:
            return ""
        left = "" if now.seconds_left is None else f", {clock(now.seconds_left)} left"
        return (
            f"{now.shards_done}/{now.shards} shards, {size_text(now.bytes_done)} of {size_text(now.bytes)}, "
            f"{size_text(now.bytes_done / max(now.seconds, 1e-9))}/s{left}"
        )

    def counts(self) -> Mapping[str, Any]:
        now = self.snapshot()
        return {
            "shards": {"done": now.shards_done, "all": now.shards},
            "bytes": {"done": now.bytes_done, "all": now.bytes},
            "seconds": round(now.seconds, 1),
            "seconds_left": None if now.seconds_left is None else round(now.seconds_left, 1),
        }

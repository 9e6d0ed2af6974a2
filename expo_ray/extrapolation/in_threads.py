"""The executor of one machine: shards in threads of this process, no cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from expo_ray.extrapolation.on_device import resolve_device
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.progress import Progress
from expo_ray.extrapolation.publish import Published, publish
from expo_ray.extrapolation.shard import extrapolate_shard

# One shard keeps about four cores busy: two with arithmetic, one hashing, one writing.
_CORES_PER_SHARD = 4
_MOST_SHARDS = 8


class Cancelled(Exception):
    """Raised inside a shard to make it stop and remove what it has written."""


class InThreads:
    """Runs shards in this process; see `expo_ray.extrapolation.job.Executor`."""

    def __init__(self, progress: Progress, *, device: str = "auto") -> None:
        self.slots = max(1, min(_MOST_SHARDS, (os.cpu_count() or 1) // _CORES_PER_SHARD))
        self._pool = ThreadPoolExecutor(self.slots, "shard")
        self._progress, self._device = progress, resolve_device(device)
        self._cancelled = threading.Event()

    def extrapolate(self, plan: PairPlan, index: int, alphas: Sequence[float]) -> Future[Any]:
        return self._pool.submit(
            extrapolate_shard, plan, index, alphas, device=self._device, on_bytes=self._count
        )

    def publish(self, plan: PairPlan, alpha: float) -> Future[Published]:
        return self._pool.submit(publish, plan, alpha)

    def cancel(self) -> None:
        self._cancelled.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _count(self, written: int) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        self._progress.add(written)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

"""The executor without a cluster: shards in threads of this process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from expo_ray.arithmetic.kernels import resolve_device
from expo_ray.errors import TransientStorageError
from expo_ray.extrapolation.model_folder import ModelFolder
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.publish import Published, publish
from expo_ray.extrapolation.run_job import Executor, Failures
from expo_ray.extrapolation.shard import extrapolate_shard
from expo_ray.progress import Progress
from expo_ray.storage.pace import in_a_hurry

# One shard keeps about four cores busy: two with arithmetic, one hashing, one writing.
_CORES_PER_SHARD = 4
_MOST_SHARDS = 8
# Attempts after the first. A store repeats single requests itself; an upload that broke must be begun anew.
MAX_RETRIES = 2

log = logging.getLogger("expo_ray")


class Cancelled(Exception):
    """Raised inside a shard to make it stop and remove what it has written."""


class InThreads(Executor):
    """Runs shards in this process; see `expo_ray.extrapolation.run_job.Executor`."""

    def __init__(self, progress: Progress, *, device: str = "auto") -> None:
        self.slots = max(1, min(_MOST_SHARDS, (os.cpu_count() or 1) // _CORES_PER_SHARD))
        self._pool = ThreadPoolExecutor(self.slots, "shard")
        self._progress, self._device = progress, resolve_device(device)
        self._cancelled = threading.Event()

    def extrapolate(self, plan: PairPlan, index: int, alphas: Sequence[float]) -> Future[Failures]:
        return self._pool.submit(self._extrapolate, plan, index, alphas)

    def publish(self, plan: PairPlan, alpha: float) -> Future[Published]:
        return self._pool.submit(lambda: publish(ModelFolder(plan, alpha)))

    def cancel(self) -> None:
        self._cancelled.set()
        with in_a_hurry():  # a shard may be waiting for a store
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _extrapolate(self, plan: PairPlan, index: int, alphas: Sequence[float]) -> Failures:
        """Write a shard, and again after an error that may pass; bytes of a failed attempt do not count as progress."""
        attempt = 0
        while True:
            written = 0

            def count(size: int) -> None:
                nonlocal written
                if self._cancelled.is_set():
                    raise Cancelled  # between pages, so that what was written is removed in an orderly way
                written += size
                self._progress.add(bytes=size)

            try:
                return extrapolate_shard(plan, index, alphas, device=self._device, on_bytes=count).failures
            except TransientStorageError as error:
                self._progress.add(bytes=-written)
                attempt += 1
                if attempt > MAX_RETRIES:
                    raise
                log.warning("%s %s is written again: %s", plan.name, plan.shards[index].file, error)

"""Extrapolate on a Ray cluster: a task for each shard, and one for each model that is published."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import ray

from expo_ray.arithmetic.kernels import resolve_device
from expo_ray.config import Device, format_alpha
from expo_ray.errors import JobError
from expo_ray.extrapolation.in_threads import Cancelled
from expo_ray.extrapolation.model_folder import ModelFolder
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.publish import Published, publish
from expo_ray.extrapolation.run_job import Executor, Failures
from expo_ray.extrapolation.shard import extrapolate_shard
from expo_ray.on_ray.cluster import SHARD_IO
from expo_ray.on_ray.reports import Reported, Reporting, note_progress, run_reported
from expo_ray.on_ray.shared_paths import refuse_unshared_output
from expo_ray.on_ray.watched_tasks import WatchedTasks
from expo_ray.progress import Progress, size_text
from expo_ray.storage.pace import in_a_hurry

log = logging.getLogger("expo_ray")

T = TypeVar("T")

# Shards are bound by input and output, so several share a GPU.
GPU_PER_SHARD = 0.25
# Tasks kept submitted even on a small cluster, so that an autoscaler sees what is wanted.
_FEWEST_SLOTS = 32
_LOOK_UP_S = 0.1


@dataclass(frozen=True, slots=True)
class ShardReport:
    """Size and time of a shard that a worker has written, for the driver's log; the receipts are in storage."""

    size: int
    seconds: float
    node: str
    failures: Failures = field(default_factory=dict)


ShardTask = Callable[[PairPlan, int, Sequence[float], str], ShardReport]
PublishTask = Callable[[PairPlan, float], Published]


@dataclass(frozen=True)
class ShardCall:
    """Arguments of a task that writes a shard; the plan is in Ray's object store.

    Attributes:
        driver: address of the driver's machine.
    """

    task: ShardTask
    plan: ray.ObjectRef[Any]
    index: int
    alphas: Sequence[float]
    device: str
    driver: str


@dataclass(frozen=True)
class PublishCall:
    """Arguments of a task that completes a model; the plan is in Ray's object store."""

    task: PublishTask
    plan: ray.ObjectRef[Any]
    alpha: float


class OnRay(Executor):
    """Runs shards on the connected Ray cluster; see `expo_ray.extrapolation.run_job.Executor`.

    Args:
        shard_task: writes one shard on a worker. Benchmarks give another, to measure Ray and the driver alone.
        publish_task: completes a model; likewise.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        device: Device = "auto",
        shard_task: ShardTask | None = None,
        publish_task: PublishTask | None = None,
    ) -> None:
        resources = _wait_for_resources()
        self._progress, self._device = progress, device
        self._plans: dict[str, ray.ObjectRef[Any]] = {}
        self._tasks, self._driver = WatchedTasks(), ray.util.get_node_ip_address()
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": 0, "scheduling_strategy": "SPREAD"}
        self._publish_task = publish_task or _publish
        self._run_publish = ray.remote(**options)(_run_publish)
        if SHARD_IO in resources:
            options["resources"] = {SHARD_IO: 1}
        else:
            log.warning("no node has the resource %s; shards are bounded by CPUs alone", SHARD_IO)
        if device == "cuda":
            check_gpus(device)
            options["num_gpus"] = GPU_PER_SHARD
        self._shard_task = shard_task or _extrapolate
        self._run_shard = ray.remote(**options)(_run_shard)
        self.slots = max(_FEWEST_SLOTS, int(resources.get(SHARD_IO, resources.get("CPU", 1))))

    def extrapolate(self, plan: PairPlan, index: int, alphas: Sequence[float]) -> Future[Failures]:
        name = f"{plan.name} {plan.shards[index].file}"

        def done(made: ShardReport) -> Failures:
            self._progress.add(bytes=made.size)
            log.info("%s: %s in %.1f s on %s", name, size_text(made.size), made.seconds, made.node)
            return made.failures

        call = ShardCall(self._shard_task, self._share(plan), index, alphas, self._device, self._driver)
        return self._tasks.run(name, self._run_shard, call, done, moves=True)

    def publish(self, plan: PairPlan, alpha: float) -> Future[Published]:
        def done(published: Published) -> Published:
            self._plans.pop(plan.name, None)  # nothing else of this pair needs it
            return published

        call = PublishCall(self._publish_task, self._share(plan), alpha)
        name = f"{plan.name} alpha={format_alpha(alpha)}"
        return self._tasks.run(name, self._run_publish, call, done, moves=False)

    def cancel(self) -> None:
        self._tasks.cancel()

    def _share(self, plan: PairPlan) -> ray.ObjectRef[Any]:
        """Put the plan into the object store, once however many shards it has."""
        if plan.name not in self._plans:
            self._plans[plan.name] = ray.put(plan)
        return self._plans[plan.name]


def check_gpus(device: Device) -> None:
    """Refuse `cuda` on a cluster without a GPU, where each shard would wait for one forever.

    Raises:
        JobError: if the connected cluster has none.
    """
    if device == "cuda" and not ray.cluster_resources().get("GPU"):
        raise JobError(
            "`device: cuda` is asked for, and the cluster has no GPU; start a GPU node, or set `device: auto`: the arithmetic "
            "then runs on CPUs, with the same bytes"
        )


def _wait_for_resources() -> dict[str, float]:
    """Wait until the cluster has a node to work on, and return its resources: an autoscaled one may begin without nodes."""
    resources: dict[str, float] = ray.cluster_resources()
    if not resources.get("CPU"):
        log.info("waiting for the cluster's first worker node")
        ray.get(ray.remote(num_cpus=1)(_arrive).remote())
        resources = ray.cluster_resources()
    return resources


def _arrive() -> None:
    """A task that any node can run."""


def _run_shard(call: ShardCall, reporting: Reporting) -> Reported[ShardReport]:
    """Write a shard in a Ray task."""

    def work() -> ShardReport:
        plan = _read_plan(call.plan)
        refuse_unshared_output(plan, call.alphas, call.driver)
        return call.task(plan, call.index, call.alphas, call.device)

    return run_reported(work, reporting)


def _run_publish(call: PublishCall, reporting: Reporting) -> Reported[Published]:
    """Complete a model in a Ray task."""
    return run_reported(lambda: call.task(_read_plan(call.plan), call.alpha), reporting)


# Kept for the pair's other shards: to read the plan of 800 tensors takes longer than everything else that Ray does for a task.
@lru_cache(maxsize=2)
def _read_plan(shared: ray.ObjectRef[Any]) -> PairPlan:
    plan: PairPlan = ray.get(shared)
    return plan


def _extrapolate(plan: PairPlan, index: int, alphas: Sequence[float], device: str) -> ShardReport:
    started = time.monotonic()
    written = run_until_cancelled(
        lambda on_bytes: extrapolate_shard(
            plan, index, alphas, device=resolve_device(device), on_bytes=on_bytes
        )
    )
    size = sum(receipt.size for receipt in written.receipts)
    return ShardReport(size, time.monotonic() - started, socket.gethostname(), written.failures)


def _publish(plan: PairPlan, alpha: float) -> Published:
    """Complete a model in a Ray task."""
    return publish(ModelFolder(plan, alpha))


def run_until_cancelled(work: Callable[[Callable[[int], None]], T]) -> T:
    """Run `work` in a thread, so that a Ray cancellation takes effect at its next progress callback and not in the middle of an upload.

    Ray interrupts the main thread of the worker wherever it is, and once more for each repeated cancellation. Inside a request to
    a store such an interrupt surfaces as an error of the credentials; inside the removal of an upload, the upload is left behind.

    Args:
        work: receives the progress callback, to call after each page.

    Raises:
        KeyboardInterrupt: if the task was cancelled.
    """
    cancelled = threading.Event()
    future: Future[T] = Future()

    def check_cancelled(_: int) -> None:
        note_progress()
        if cancelled.is_set():
            raise Cancelled

    def run() -> None:
        try:
            future.set_result(work(check_cancelled))
        except BaseException as error:
            future.set_exception(error)

    started, thread = False, threading.Thread(target=run, name="shard", daemon=True)
    with ExitStack() as stack:
        while True:
            try:
                if not started:
                    started = True
                    thread.start()
                while not future.done():  # an interrupt is noticed only after a wait, so waits are short
                    wait([future], timeout=_LOOK_UP_S)
                break
            except KeyboardInterrupt:
                cancelled.set()
                stack.enter_context(in_a_hurry())
    if cancelled.is_set():
        raise KeyboardInterrupt
    return future.result()

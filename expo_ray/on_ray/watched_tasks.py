"""Ray tasks that the driver watches: where each runs and whether it moves bytes; a lost or stalled one is begun again elsewhere.

Ray repeats a task by itself only once it knows that its worker is dead, which may take minutes, on whatever node is free, which may
be the one that has just failed, and never while the worker hangs.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from expo_ray.errors import JobError, TransientStorageError
from expo_ray.on_ray.capacity import node_groups
from expo_ray.on_ray.reports import NotWanted, Reporting, Reports
from expo_ray.text import shown

log = logging.getLogger("expo_ray")

T = TypeVar("T")

# Attempts of a task after the first: its worker or node died, a store did not answer, it did not move.
MAX_RETRIES = 5
# Failures in a row after which a node gets no more tasks.
MOST_IN_A_ROW = 3
# Twice as long as a store is waited for.
STALLED_S = 600.0
# Ray itself tells most tasks of a dead node apart within this time.
LOST_S = 20.0
LOOK_S = 5.0
_CLEAN_UP_S = 30.0
_CANCEL_AGAIN_S = 5.0
_NODE = "ray.io/node-id"
# Errors of a machine or of the way to a store, which may not be met again; others would be.
_PASSING = (
    TransientStorageError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError, ObjectLostError,
    RaySystemError, OSError,
)  # fmt: skip


@dataclass(eq=False)
class _Task:
    """A task, over all its attempts.

    Attributes:
        function: of Ray; it is called with `call` and where the attempt reports.
        done: makes what the future holds of the result.
        moves: whether it reports that bytes move.
        settled: the future has its result or error, or is about to.
    """

    name: str
    function: Any
    call: object
    done: Callable[[Any], Any]
    moves: bool
    outcome: Future[Any] = field(default_factory=Future)
    failures: int = 0
    settled: bool = False


@dataclass(eq=False)
class _Attempt:
    task: _Task
    ref: ray.ObjectRef[Any]
    lost_at: float | None = None


class WatchedTasks:
    """Tasks on the connected cluster, each with as many attempts as it needs; a thread watches them until `cancel`."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
        self._reports: Any = ray.remote(**options)(Reports).remote()
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._under_way: dict[int, _Attempt] = {}
        # Attempts that were given up and may live on, and since when.
        self._given_up: dict[ray.ObjectRef[Any], float] = {}
        self._in_a_row: Counter[str] = Counter()
        self._excluded: set[str] = set()
        self._failed: queue.SimpleQueue[tuple[int, BaseException] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def run(
        self, name: str, function: Any, call: object, done: Callable[[Any], T], *, moves: bool
    ) -> Future[T]:
        """Begin a task; see `_Task`. The future holds what `done` returns, or the task's own error without Ray's wrapping."""
        task = _Task(name, function, call, done, moves)
        self._begin(task)
        return task.outcome

    def cancel(self) -> None:
        """Cancel what is under way, and wait a while until it has cleaned up."""
        self._failed.put(None)
        with self._lock:
            refs = [*(attempt.ref for attempt in self._under_way.values()), *self._given_up]
            self._under_way.clear()  # a second call must not wait for them again
            self._given_up.clear()
        deadline = time.monotonic() + _CLEAN_UP_S
        while refs and time.monotonic() < deadline:  # a cancelled task still has to remove its uploads
            for ref in refs:  # repeatedly: Ray loses a cancellation that arrives before its task has started
                ray.cancel(ref)
            _, refs = ray.wait(refs, num_returns=len(refs), timeout=_CANCEL_AGAIN_S)
        with suppress(RayError, ValueError):
            ray.kill(self._reports)

    def _begin(self, task: _Task) -> None:
        with self._lock:
            number = next(self._numbers)
            excluded = ",".join(sorted(self._excluded))
            options = {"label_selector": {_NODE: f"!in({excluded})"}} if excluded else {}
            ref = task.function.options(**options).remote(task.call, Reporting(self._reports, number))
            self._under_way[number] = _Attempt(task, ref)
        ref.future().add_done_callback(lambda of_ray: self._ended(number, task, of_ray))

    def _ended(self, number: int, task: _Task, of_ray: Future[Any]) -> None:
        """Settle a task whose attempt has succeeded; what has failed is left to the watching thread, which may ask Ray."""
        if error := of_ray.exception():
            self._failed.put((number, error))
            return
        reported = of_ray.result()
        with self._lock:
            self._under_way.pop(number, None)
            self._in_a_row[reported.node] = 0
            first, task.settled = not task.settled, True
        if first:
            try:
                result = task.done(reported.result)
            except BaseException as error:
                task.outcome.set_exception(error)
            else:
                task.outcome.set_result(result)

    def _watch(self) -> None:
        next_look = time.monotonic() + LOOK_S
        while True:
            with suppress(queue.Empty):
                failed = self._failed.get(timeout=max(0.0, next_look - time.monotonic()))
                if failed is None:
                    return
                self._failure(*failed)
            if time.monotonic() >= next_look:
                try:
                    self._look()
                except (
                    Exception
                ) as error:  # a cluster that is losing its head; the thread has to live on for the next look
                    log.warning("the cluster was not looked at: %s", _reason(error))
                next_look = time.monotonic() + LOOK_S

    def _failure(self, number: int, error: BaseException) -> None:
        """Begin a task again whose attempt has failed by its machine or its way to a store; another error is the task's."""
        with self._lock:
            attempt = self._under_way.pop(number, None)
        if attempt is None:  # given up before
            return
        cause = error.cause if isinstance(error, RayTaskError) and error.cause else error
        try:
            node = self._read().get(number, ("", 0.0))[0]
            self._reports.forget.remote(number)
            if isinstance(cause, NotWanted):
                self._begin(attempt.task)
            elif isinstance(cause, _PASSING):
                self._again(attempt.task, node, cause)
            else:
                self._settle(attempt.task, cause)
        except Exception as mistake:  # whoever waits for the task must hear of it
            self._settle(attempt.task, mistake)

    def _look(self) -> None:
        """Give up attempts on nodes that are gone, and those that do not move; end what does not stop by itself."""
        began, now = self._read(), time.monotonic()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        with self._lock:
            under_way = [(n, attempt, *began[n]) for n, attempt in self._under_way.items() if n in began]
            stubborn = [ref for ref, since in self._given_up.items() if now - since > _CLEAN_UP_S]
            for ref in stubborn:
                del self._given_up[ref]
        for ref in stubborn:
            ray.cancel(ref, force=True)
        for number, attempt, node, idle_s in under_way:
            if node in alive:
                attempt.lost_at = None
            elif attempt.lost_at is None:
                attempt.lost_at = now
            if attempt.lost_at is not None and now - attempt.lost_at > LOST_S:
                self._give_up(number, node, f"its node is gone for {now - attempt.lost_at:.0f} s")
            elif attempt.task.moves and idle_s > STALLED_S:
                self._give_up(number, node, f"it moved nothing for {idle_s:.0f} s")
        if self._excluded and not (_usable(alive) - self._excluded) and not node_groups():
            self._readmit()

    def _give_up(self, number: int, node: str, reason: str) -> None:
        """Cancel an attempt without waiting for it, and begin its task again."""
        with self._lock:
            attempt = self._under_way.pop(number, None)
            if attempt is None or attempt.task.settled:
                return
            self._given_up[attempt.ref] = time.monotonic()
        self._reports.drop.remote(number)
        ray.cancel(attempt.ref)
        self._again(attempt.task, node, JobError(f"{reason}; look at this machine and its way to the store"))

    def _again(self, task: _Task, node: str, error: BaseException) -> None:
        task.failures += 1
        self._count(node)
        if task.failures > MAX_RETRIES:
            self._settle(task, error)
            return
        log.warning(
            "%s: attempt %d of %d failed on %s (%s); it is begun again",
            task.name, task.failures, MAX_RETRIES + 1, _name_of(node), _reason(error),
        )  # fmt: skip
        self._begin(task)

    def _count(self, node: str) -> None:
        """Count a failure of a node, and give it no more tasks after three in a row if another one does better."""
        self._in_a_row[node] += 1
        alive = {each["NodeID"] for each in ray.nodes() if each["Alive"]}
        if self._in_a_row[node] < MOST_IN_A_ROW or node not in alive - self._excluded:
            return
        if any(not self._in_a_row[other] for other in _usable(alive) - self._excluded - {node}):
            log.warning("%s: %d failures in a row; it gets no more work", _name_of(node), MOST_IN_A_ROW)
            with self._lock:
                self._excluded.add(node)
            self._reports.refuse.remote(self._excluded)

    def _readmit(self) -> None:
        """Take excluded nodes back, as no other is left; tasks that wait for others are begun anew."""
        log.warning("no other node is left: those that failed get work again")
        self._in_a_row.clear()
        self._reports.refuse.remote(set())
        began = self._read()
        with self._lock:
            self._excluded.clear()
            waiting = {n: attempt for n, attempt in self._under_way.items() if n not in began}
            for number in waiting:
                del self._under_way[number]
        for number, attempt in waiting.items():
            self._reports.drop.remote(number)
            ray.cancel(attempt.ref)
            self._begin(attempt.task)

    def _settle(self, task: _Task, error: BaseException) -> None:
        with self._lock:
            first, task.settled = not task.settled, True
        if first:
            task.outcome.set_exception(error)

    def _read(self) -> dict[int, tuple[str, float]]:
        """Read where attempts run; empty if that is not known at the moment."""
        try:
            began: dict[int, tuple[str, float]] = ray.get(self._reports.read.remote(), timeout=LOOK_S)
        except RayError:
            return {}
        return began


def _usable(alive: set[str]) -> set[str]:
    """Those of some nodes that have CPUs."""
    return {
        node["NodeID"] for node in ray.nodes() if node["NodeID"] in alive and node["Resources"].get("CPU")
    }


def _name_of(node: str) -> str:
    """Host of a node for messages."""
    names = [
        f"{each['NodeManagerHostname']} ({each['NodeManagerAddress']})"
        for each in ray.nodes()
        if each["NodeID"] == node
    ]
    return names[0] if names else "an unknown node"


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return shown(lines[0] if lines else type(error).__name__)

"""Run a whole job: extrapolate what is missing and publish, in this process or on a cluster."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from expo_ray.config import format_alpha
from expo_ray.errors import ExpoError, OutputError, TransientStorageError, in_one_line
from expo_ray.extrapolation.integrity import DamagedReading
from expo_ray.extrapolation.model_folder import FolderState, ModelFolder
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.plan_job import JobPlan, inspect_pairs
from expo_ray.extrapolation.publish import Published
from expo_ray.progress import Progress
from expo_ray.storage import Store, check_conditional_writes
from expo_ray.text import first_few

log = logging.getLogger("expo_ray")

# Why models of a pair cannot be written, by alpha.
Failures = Mapping[float, ExpoError]

STALL_WARNING_S = 300
# So often a model is written again whose parents were damaged on their way.
_MOST_REPEATS = 2


class Executor(Protocol):
    """Place where the work runs: threads of this process, or a Ray cluster. Both count in a `Progress` what they have written.

    Work is given as plan and alpha, which can travel to another machine, and not as an open `ModelFolder`. As a context manager
    it cancels on the way out.

    Attributes:
        slots: number of shards worth having under way at once.
    """

    slots: int

    def extrapolate(self, plan: PairPlan, index: int, alphas: Sequence[float]) -> Future[Failures]:
        """Write one shard of the models at `alphas`, and their receipts; the result names those that cannot be written."""

    def publish(self, plan: PairPlan, alpha: float) -> Future[Published]:
        """Complete a model whose shards are stored."""

    def cancel(self) -> None:
        """Stop what is under way; unfinished files and uploads are removed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


@dataclass
class Outcome:
    """The models that a job has published, and the first error of each pair or model that failed."""

    published: list[Published] = field(default_factory=list)
    failures: dict[str, Exception] = field(default_factory=dict)


def run_job(job_plan: JobPlan, executor: Executor, progress: Progress) -> Outcome:
    """Do all that the job still lacks. What fails, a pair or one of its models, does not stop the others.

    Raises:
        ExpoError: if an output cannot be reserved; then nothing has been done.
    """
    _reserve(job_plan, set())
    return _work_off(job_plan, executor, progress)


def run_pairs(plans: Sequence[PairPlan], executor: Executor, progress: Progress) -> Outcome:
    """Publish pairs that were planned before. A pair that cannot be written any more fails alone.

    A parent that was replaced since is named among the failures, and nothing of its pair is written.
    """
    job_plan, failures = inspect_pairs(plans)
    reserved: list[PairPlan] = []
    probed: set[str] = set()
    for plan in job_plan.pairs:
        try:
            _reserve(JobPlan((plan,), job_plan.states), probed)
        except ExpoError as error:
            failures[plan.name] = error
        else:
            reserved.append(plan)
    for name, reason in failures.items():
        log.error("%s failed: %s", name, in_one_line(reason))
    outcome = _work_off(JobPlan(tuple(reserved), job_plan.states), executor, progress)
    return Outcome(outcome.published, failures | outcome.failures)


def _work_off(job_plan: JobPlan, executor: Executor, progress: Progress) -> Outcome:
    """Run a job to its end, and release the folders of models that failed before anything of them was stored."""
    run = _Run(job_plan, executor, progress)
    try:
        run.work_off()
    except BaseException:
        executor.cancel()
        raise
    _release(_failed_models(job_plan, run.outcome.failures))
    return run.outcome


def _reserve(job_plan: JobPlan, probed: set[str]) -> None:
    """Claim every output that is still to be written, or none.

    Args:
        probed: stores that are known to honour conditional writes; those probed here are added.

    Raises:
        ExpoError: if an output cannot be claimed.
    """
    claimed: list[ModelFolder] = []
    for plan in job_plan.pairs:
        for alpha in plan.outputs:
            state = job_plan.states[plan.name, alpha]
            if state.published:
                continue
            folder = ModelFolder(plan, alpha)
            _probe(folder.store, probed)
            try:
                _make_way(folder, state)
            except OutputError:
                _release(claimed)
                raise
            claimed.append(folder)


def _probe(store: Store, probed: set[str]) -> None:
    """Check by a write that a store honours conditional writes: every local folder, and every bucket once."""
    place = store.uri if store.local_path is not None else store.uri.split("/")[2]
    if place not in probed:
        check_conditional_writes(store)
        probed.add(place)


def _make_way(folder: ModelFolder, state: FolderState) -> None:
    """Delete what is to be overwritten, and claim the folder."""
    if state.stale:
        folder.clear()
    if state.damaged:
        folder.delete_manifest()
    folder.claim()


def _release(folders: Iterable[ModelFolder]) -> None:
    """Leave folders in which nothing was stored to other plans."""
    for folder in folders:
        with suppress(ExpoError):
            folder.release()


def _failed_models(job_plan: JobPlan, failures: Mapping[str, Exception]) -> Iterator[ModelFolder]:
    """Folders of models that failed, but for a store that does not answer: releasing them would wait for it once more."""
    for plan in job_plan.pairs:
        for alpha in plan.outputs:
            error = failures.get(plan.name) or failures.get(_model(plan, alpha))
            if isinstance(error, ExpoError) and not isinstance(error, TransientStorageError):
                yield ModelFolder(plan, alpha)


class _Run:
    """The state of one run.

    Attributes:
        queue: shards that are not begun, as plan, index and the alphas to write.
        under_way: futures of shards, and of publications, which have an alpha.
        unfinished: number of shards, by pair, that are queued or under way; its models are published once there are none.
    """

    def __init__(self, job_plan: JobPlan, executor: Executor, progress: Progress) -> None:
        self.job_plan, self.executor, self.progress = job_plan, executor, progress
        self.outcome = Outcome()
        work = [
            (plan, index, tuple(alphas))
            for plan in job_plan.pairs
            for index in range(len(plan.shards))
            if (alphas := job_plan.missing(plan, index))
        ]
        # The biggest first, so that no big one is left to run alone at the end; popped from the back.
        self.queue = sorted(work, key=lambda item: item[0].shards[item[1]].size)
        self.unfinished = Counter(plan.name for plan, _, _ in work)
        self.repeated: Counter[str] = Counter()
        self.under_way: dict[Future[Any], tuple[PairPlan, float | None]] = {}
        progress.expect(shards=len(work), bytes=job_plan.bytes_to_write)

    def work_off(self) -> None:
        """Extrapolate and publish until nothing is left."""
        for plan in self.job_plan.pairs:
            if not self.unfinished[plan.name]:
                self._publish(plan)
        while self.queue or self.under_way:
            self._submit()
            done, _ = wait(self.under_way, timeout=STALL_WARNING_S, return_when=FIRST_COMPLETED)
            for future in done:
                self._settle(future, *self.under_way.pop(future))
            if self.under_way and not done:
                names = sorted({plan.name for plan, _ in self.under_way.values()})
                log.warning(
                    "nothing has finished for %d s; %d shard(s) are under way (%s): look for a lost node or a stalled store",
                    STALL_WARNING_S, len(self.under_way), first_few(names),
                )  # fmt: skip

    def _submit(self) -> None:
        """Hand shards to the executor while it has room."""
        # Twice as many as there are slots, so that none is idle while the driver settles what has finished.
        while self.queue and len(self.under_way) < 2 * self.executor.slots:
            plan, index, wanted = self.queue.pop()
            alphas = self._possible(plan, wanted)
            if alphas:
                self.under_way[self.executor.extrapolate(plan, index, alphas)] = (plan, None)
            else:
                self._shard_settled(plan)

    def _settle(self, future: Future[Any], plan: PairPlan, alpha: float | None) -> None:
        """Record the end of a shard, or of the publication at `alpha`."""
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        if alpha is not None:
            if isinstance(error, DamagedReading) and self._write_again(plan, alpha, error):
                return
            if error:
                self._fail(_model(plan, alpha), error)
            else:
                self.outcome.published.append(future.result())
                log.info("published %s", plan.outputs[alpha])
            return
        if error:
            self._fail(plan.name, error)
        else:
            for failed, reason in future.result().items():
                self._fail(_model(plan, failed), reason)
            self.progress.add(shards=1)
        self._shard_settled(plan)

    def _write_again(self, plan: PairPlan, alpha: float, error: DamagedReading) -> bool:
        """Queue the shards of a model whose parents were not read as they are stored; false if that has not helped before."""
        name = _model(plan, alpha)
        if self.repeated[name] == _MOST_REPEATS:
            return False
        self.repeated[name] += 1
        log.warning("%s: %s", name, error)
        again = [(plan, i, (alpha,)) for i, shard in enumerate(plan.shards) if shard.file in error.shards]
        self.queue += again
        self.unfinished[plan.name] += len(again)
        self.progress.expect(shards=len(again), bytes=sum(plan.shards[index].size for _, index, _ in again))
        return True

    def _shard_settled(self, plan: PairPlan) -> None:
        """Count one shard of the pair as done or failed, and publish the pair's models after the last."""
        self.unfinished[plan.name] -= 1
        if not self.unfinished[plan.name]:
            self._publish(plan)

    def _possible(self, plan: PairPlan, alphas: Iterable[float]) -> list[float]:
        """Alphas whose model has not failed."""
        failures = self.outcome.failures
        if plan.name in failures:
            return []
        return [alpha for alpha in alphas if _model(plan, alpha) not in failures]

    def _publish(self, plan: PairPlan) -> None:
        begun = {alpha for other, alpha in self.under_way.values() if other is plan}
        begun |= {model.alpha for model in self.outcome.published if model.pair == plan.name}
        for alpha in self._possible(plan, [alpha for alpha in plan.outputs if alpha not in begun]):
            self.under_way[self.executor.publish(plan, alpha)] = (plan, alpha)

    def _fail(self, name: str, error: Exception) -> None:
        if name not in self.outcome.failures:
            self.outcome.failures[name] = error
            # The summary gives the reason of an error that a user can fix; of any other, the log has it in full.
            log.error("%s failed", name, exc_info=None if isinstance(error, ExpoError) else error)


def _model(plan: PairPlan, alpha: float) -> str:
    """Name of a model among the failures."""
    return f"{plan.name} alpha={format_alpha(alpha)}"

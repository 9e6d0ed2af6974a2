"""The searches of a job's pairs, as many at a time as the cluster has room for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import ray

from expo_ray.errors import ExpoError, JobError, NotFound, OutputError, in_one_line
from expo_ray.evaluation.paths import search_key
from expo_ray.evaluation.search.groups import search_groups
from expo_ray.evaluation.search.pair_result import pair_result
from expo_ray.evaluation.search.search_pair import search_pair
from expo_ray.extrapolation.pinned import refuse_replaced
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.on_ray.check_job import Prepared
from expo_ray.on_ray.pair_evaluator import PairEvaluator, Scorers
from expo_ray.on_ray.serving.serve_models import serving
from expo_ray.progress import Progress
from expo_ray.report.results import PairResult, Results
from expo_ray.report.results_file import RESULTS_BYTES, parse_results, results_json
from expo_ray.storage import Store

log = logging.getLogger("expo_ray")


@dataclass
class Searched:
    """What came of searching.

    Attributes:
        found: by pair, in the job's order.
        failures: error by pair.
        num_tokens: of all responses that were looked at.
    """

    found: dict[str, PairResult] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    num_tokens: int = 0


def search_pairs(prepared: Prepared, store: Store) -> Searched:
    """Choose the alpha of every pair whose search is not stored, on the connected cluster.

    Raises:
        ExpoError: if the cluster cannot hold the engines, or the reward models do not start, and no search is stored.
    """
    searched = Searched()
    for plan in prepared.plans:
        if stored := _stored(store, search_key(plan.name, prepared.search_id(plan))):
            log.info("%s: its search is stored; %s", plan.name, stored.reason)
            searched.found[plan.name] = stored
    todo = [plan for plan in prepared.plans if plan.name not in searched.found]
    try:
        if todo:
            _search_missing(prepared, store, todo, searched)
    except ExpoError as error:
        if not searched.found:
            raise
        _fail(searched, todo, error)
    names = [plan.name for plan in prepared.plans if plan.name in searched.found]
    searched.found = {name: searched.found[name] for name in names}
    return searched


def _search_missing(prepared: Prepared, store: Store, todo: Sequence[PairPlan], searched: Searched) -> None:
    """Search pairs in waves, and add what comes of it to `searched`; a wave whose engines do not start fails alone."""
    waves = _waves(todo, prepared)
    with ExitStack() as stack, Progress("search", store, rows="responses") as progress:
        for pool in prepared.pools:
            stack.enter_context(pool)
        scorers = Scorers(prepared.pools)
        for planned in waves:
            wave = drop_replaced(planned, searched)
            if not wave:
                continue
            try:
                _search_wave(prepared, store, wave, scorers=scorers, progress=progress, searched=searched)
            except ExpoError as error:
                _fail(searched, wave, error)
        progress.finish(sorted(searched.failures))


def drop_replaced(plans: Sequence[PairPlan], searched: Searched) -> list[PairPlan]:
    """Drop the pairs whose parents are no longer those that were planned, and record them as failures.

    The last waves begin hours after the check, and an engine that finds another parent fails all pairs of its wave.
    """
    kept = []
    for plan in plans:
        try:
            refuse_replaced(plan)
        except ExpoError as error:
            _fail(searched, [plan], error)
        else:
            kept.append(plan)
    return kept


def _search_wave(
    prepared: Prepared,
    store: Store,
    wave: Sequence[PairPlan],
    *,
    scorers: Scorers,
    progress: Progress,
    searched: Searched,
) -> None:
    with serving(wave, (), prepared.job.serving) as endpoint, ThreadPoolExecutor(len(wave)) as threads:
        evaluators = [
            PairEvaluator(
                plan, endpoint.url, scorers, sampling=prepared.job.sampling, store=store, progress=progress,
                slots=endpoint.slots // len(wave), at_once=prepared.job.serving.replicas,
                key_variable=endpoint.key_variable,
            )
            for plan in wave
        ]  # fmt: skip
        outcomes = threads.map(partial(_search_one, prepared, store, progress), wave, evaluators)
        for plan, outcome in zip(wave, outcomes, strict=True):
            if isinstance(outcome, ExpoError):
                _fail(searched, [plan], outcome)
            else:
                searched.found[plan.name] = outcome
        searched.num_tokens += sum(evaluator.num_tokens for evaluator in evaluators)


def _fail(searched: Searched, plans: Sequence[PairPlan], error: ExpoError) -> None:
    """Record why these pairs have no result, unless it is known already or they have one."""
    for plan in plans:
        if plan.name not in searched.found and plan.name not in searched.failures:
            searched.failures[plan.name] = in_one_line(error)
            log.error("%s failed: %s", plan.name, in_one_line(error))


def _search_one(
    prepared: Prepared, store: Store, progress: Progress, plan: PairPlan, evaluate: PairEvaluator
) -> PairResult | ExpoError:
    settings, prompts = prepared.job.search, prepared.prompts
    told, at_once = partial(progress.note, plan.name), prepared.job.serving.replicas + 1
    try:
        history, decision = search_pair(prompts, settings, evaluate, told, at_once=at_once)
        groups = (
            search_groups(decision.alpha, prompts, settings, evaluate, told, at_once=at_once)
            if settings.groups and decision.alpha
            else None
        )
    except ExpoError as error:
        return error
    result = pair_result(
        plan, history, decision, settings, evaluate.texts, generations=evaluate.num_responses, groups=groups
    )
    alone = Results(store.uri, "", (result,))
    store.put(search_key(plan.name, prepared.search_id(plan)), results_json(alone))
    return result


def _stored(store: Store, key: str) -> PairResult | None:
    """A finished search; one that cannot be read, because another version wrote it, is done again from the stored rows."""
    try:
        results = parse_results(store.read(key, most_bytes=RESULTS_BYTES), f"{store.uri}/{key}")
    except (NotFound, OutputError):
        return None
    return results.pairs[0] if results.pairs else None


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

"""The two steps of the pipeline that need a cluster: search the alpha of every pair, publish the winners.

What each step makes is stored at a place that follows from its inputs, so a rerun does what is missing and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import ray

from expo_ray.errors import ExpoError, in_one_line
from expo_ray.evaluation.check_job import CheckedJob, store_job_prompts
from expo_ray.evaluation.job_report import Searches, Usage, Winners
from expo_ray.evaluation.paths import rungs_key, search_key
from expo_ray.evaluation.search.pair_evaluator import PairEvaluator
from expo_ray.evaluation.search.roles import Roles
from expo_ray.evaluation.search.rung_log import RungLog
from expo_ray.evaluation.search.search_pair import search_pair
from expo_ray.evaluation.search.stored_searches import read_stored_searches
from expo_ray.extrapolation.model_folder import ModelFolder
from expo_ray.extrapolation.pinned import plan_publication, refuse_replaced_parents
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.plan_job import outputs_of
from expo_ray.extrapolation.publish import Published, publish
from expo_ray.extrapolation.run_job import run_pairs
from expo_ray.extrapolation.step import GROUPS, Step
from expo_ray.on_ray.extrapolation import OnRay, check_gpus
from expo_ray.on_ray.rewards.memory import check_memory
from expo_ray.on_ray.rewards.pool import RewardPool
from expo_ray.on_ray.search_room import SearchRoom, make_room
from expo_ray.on_ray.serving.serve_models import serving
from expo_ray.progress import Progress
from expo_ray.report.results import PairResult, Results
from expo_ray.report.results_file import results_json
from expo_ray.storage import open_store

log = logging.getLogger("expo_ray")


def search_pairs(checked: CheckedJob) -> Searches:
    """Choose the alpha of every pair whose search is not stored, on the connected cluster.

    A pair that fails does not stop the others; it is named among the failures.

    Raises:
        ExpoError: if the cluster cannot hold the engines, or the reward models do not start, and no search is stored; or if
            winners are to be extrapolated on GPUs, and it has none.
    """
    check_gpus(checked.job.device)  # now, not when hours of search are over
    store_job_prompts(checked)
    started = time.monotonic()
    with ExitStack() as stack:
        pools = [stack.enter_context(RewardPool(model)) for model in checked.rewards]
        run = _SearchRun(checked, pools)
        run.read_stored()
        missing = [plan for plan in checked.plans if plan.name not in run.searches.results]
        try:
            if missing:
                run.search(missing)
        except ExpoError as error:
            if not run.searches.results:
                raise
            run.searches.add_failure(missing, error)
    searches = run.searches
    searches.usage = _usage_since(started)
    in_order = [plan.name for plan in checked.plans if plan.name in searches.results]
    searches.results = {name: searches.results[name] for name in in_order}
    return searches


class _SearchRun:
    """Searches under way, and the results so far.

    Args:
        pools: the reward models; their actors start with the first responses.
    """

    def __init__(self, checked: CheckedJob, pools: Sequence[RewardPool]) -> None:
        self._checked, self._job, self._pools = checked, checked.job, pools
        self._store = open_store(checked.job.output)
        self.searches = Searches()

    def read_stored(self) -> None:
        """Read the searches that an earlier run has finished."""
        self.searches.results = read_stored_searches(self._checked)
        for name, result in self.searches.results.items():
            log.info("%s: its search is stored; %s", name, result.reason)

    def search(self, plans: Sequence[PairPlan]) -> None:
        """Search pairs, as many at a time as the cluster has room for; a batch whose engines do not start fails alone."""
        check_memory([pool.need for pool in self._pools])
        room = make_room(plans, self._job.serving, self._pools)
        size = room.pairs
        with Progress("search", self._store, rows="responses") as progress:
            for first in range(0, len(plans), size):
                batch = drop_replaced(plans[first : first + size], self.searches)
                try:
                    if batch:
                        self._search_batch(batch, room, progress)
                except ExpoError as error:
                    self.searches.add_failure(batch, error)
            progress.finish(sorted(self.searches.failures))

    def _search_batch(self, plans: Sequence[PairPlan], room: SearchRoom, progress: Progress) -> None:
        """Start the engines of some pairs and search all of them at the same time."""
        settings, places = self._job.serving, {plan.name: room.engine for plan in plans if room.engine}
        replicas = min(settings.replicas, room.engine.count) if room.engine else settings.replicas
        with (
            serving(plans, (), settings, places) as endpoint,
            ThreadPoolExecutor(len(plans)) as threads,
        ):
            at_once = [replicas * endpoint.alphas_at_once(plan.name) for plan in plans]
            evaluators = [
                PairEvaluator(
                    plan, endpoint.url, room.scorers, sampling=self._job.sampling, store=self._store, progress=progress,
                    slots=endpoint.slots // len(plans), at_once=steps, key_variable=endpoint.key_variable,
                )
                for plan, steps in zip(plans, at_once, strict=True)
            ]  # fmt: skip
            searching = [
                threads.submit(self._search_pair, plan, evaluator, steps, progress)
                for plan, evaluator, steps in zip(plans, evaluators, at_once, strict=True)
            ]
            for plan, future in zip(plans, searching, strict=True):
                try:
                    self.searches.results[plan.name] = future.result()
                except ExpoError as error:
                    self.searches.add_failure([plan], error)
            self.searches.num_tokens += sum(evaluator.num_tokens for evaluator in evaluators)

    def _search_pair(
        self, plan: PairPlan, evaluator: PairEvaluator, steps: int, progress: Progress
    ) -> PairResult:
        """Choose alpha, then multipliers if the job asks for them, and store the result.

        Args:
            steps: that the pair's engines answer at the same time.
        """
        search_id = self._checked.search_id(plan)
        result = search_pair(
            plan, self._checked.prompts, self._job.search, evaluator,
            announce=lambda text: progress.note(plan.name, text),
            at_once=steps + 1,  # the next step is asked while rewards of the last are made
            rung_log=RungLog(self._store, rungs_key(plan.name, search_id)),
            roles=Roles.of(self._job.rewards, self._job.search),
        )  # fmt: skip
        results = results_json(Results(self._store.uri, "", (result,)))
        self._store.put(search_key(plan.name, search_id), results)
        return result


def drop_replaced(plans: Sequence[PairPlan], searches: Searches) -> list[PairPlan]:
    """Drop the pairs whose parents are no longer those that were planned, and record them as failures.

    The last batches begin hours after the check, and an engine that finds another parent fails all pairs of its batch.
    """
    unchanged = []
    for plan in plans:
        try:
            refuse_replaced_parents(plan)
        except ExpoError as error:
            searches.add_failure([plan], error)
        else:
            unchanged.append(plan)
    return unchanged


def publish_winners(checked: CheckedJob, searches: Searches) -> Winners:
    """Publish the winners from the parents that were searched, with the search's results in their cards.

    What is published already is left alone. A pair that cannot be published is named among the failures, and the others are
    published.
    """
    started = time.monotonic()
    winners = Winners()
    if plans := _publication_plans(checked, searches, winners):
        _publish(checked, searches, plans, winners)
    winners.usage = _usage_since(started)
    return winners


def _publish(checked: CheckedJob, searches: Searches, plans: Sequence[PairPlan], winners: Winners) -> None:
    """Publish all plans on the cluster, and add the models and failures to `winners`."""

    def publish_with_result(plan: PairPlan, alpha: float) -> Published:
        return publish(ModelFolder(plan, alpha), searches.results[plan.name])

    with (
        Progress("extrapolate", open_store(checked.job.output)) as progress,
        OnRay(progress, device=checked.job.device, publish_task=publish_with_result) as executor,
    ):
        outcome = run_pairs(plans, executor, progress)
        winners.failures |= {name: in_one_line(error) for name, error in outcome.failures.items()}
        progress.finish(sorted(winners.failures), published=len(outcome.published))
    for model in outcome.published:
        winners.models.setdefault(model.pair, {})[model.alpha] = model


def _publication_plans(checked: CheckedJob, searches: Searches, winners: Winners) -> list[PairPlan]:
    """Plan what is to be published of each pair; pairs that cannot be are added to the failures of `winners`.

    No plan where dpo is kept and nothing else is asked for.
    """
    plans, job = [], checked.job
    for pair, plan in zip(job.pairs, checked.plans, strict=True):
        result = searches.results.get(pair.name)
        if result is None:
            continue
        asked = pair.alphas if job.publish == "all" else ()
        alphas = tuple(sorted({*asked, *([result.decision] if result.decision else [])}))
        if not alphas:
            continue
        outputs = outputs_of(job, pair.model_copy(update={"alphas": alphas}))
        try:
            plans.append(plan_publication(plan, pair, _chosen_step(result), outputs))
        except ExpoError as error:
            winners.failures[pair.name] = in_one_line(error)
            log.error("%s failed: %s", pair.name, in_one_line(error))
    return plans


def _chosen_step(result: PairResult) -> Step:
    factors = {group: result.multipliers[group] for group in GROUPS if group in result.multipliers}
    return Step.of(result.decision, factors)


def _usage_since(started: float) -> Usage:
    """Time since `started`, multiplied by the CPUs and GPUs that the cluster has now."""
    seconds, resources = time.monotonic() - started, ray.cluster_resources()
    return Usage(seconds, seconds * resources.get("CPU", 0), seconds * resources.get("GPU", 0))

"""The two steps of the pipeline that need a cluster: search the alpha of every pair, publish the winners.

What each step makes is stored at a place that follows from its inputs, so a rerun does what is missing and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext

import ray

from expo_ray.errors import ExpoError, in_one_line
from expo_ray.evaluation.check_job import CheckedJob, store_job_prompts
from expo_ray.evaluation.job_report import Searches, Usage, Winners
from expo_ray.evaluation.paths import rungs_key, search_key
from expo_ray.evaluation.responses.endpoint import KEY_VARIABLE
from expo_ray.evaluation.search.pair_evaluator import PairEvaluator
from expo_ray.evaluation.search.roles import Roles
from expo_ray.evaluation.search.rung_log import RungLog
from expo_ray.evaluation.search.search_pair import search_pair
from expo_ray.evaluation.search.stored_searches import read_stored_searches
from expo_ray.evaluation.turns import Turn
from expo_ray.extrapolation.model_folder import ModelFolder
from expo_ray.extrapolation.pinned import plan_publication, refuse_replaced_parents
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.plan_job import outputs_of
from expo_ray.extrapolation.publish import Published, publish
from expo_ray.extrapolation.run_job import run_pairs
from expo_ray.on_ray.capacity import find_devices, settled
from expo_ray.on_ray.extrapolation import OnRay, check_gpus
from expo_ray.on_ray.rewards.pool import RewardPool
from expo_ray.on_ray.search_room import SearchRoom, make_room
from expo_ray.on_ray.serving.endpoint import Endpoint, http_proxy, ingress
from expo_ray.on_ray.serving.engine_groups import EngineGroup, Engines, pair_group
from expo_ray.progress import Progress
from expo_ray.report.results import PairResult, Results
from expo_ray.report.results_file import results_json
from expo_ray.status_file import StatusFile
from expo_ray.storage import open_store

log = logging.getLogger("expo_ray")

# How often a pair that waits looks for nodes that have joined.
LOOK_FOR_ROOM_S = 10.0
# More steps than a round of a search has.
WHOLE_ROUND = 64


def search_pairs(checked: CheckedJob, status: StatusFile | None = None) -> Searches:
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
        run = _SearchRun(checked, stack, status)
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
        stack: closes the reward models.
    """

    def __init__(self, checked: CheckedJob, stack: ExitStack, status: StatusFile | None) -> None:
        self._status = status
        self._checked, self._job, self._stack = checked, checked.job, stack
        self._store = open_store(checked.job.output)
        self._counting = threading.Lock()
        self.searches = Searches()

    def read_stored(self) -> None:
        """Read the searches that an earlier run has finished."""
        self.searches.results = read_stored_searches(self._checked)
        for name, result in self.searches.results.items():
            log.info("%s: its search is stored; %s", name, result.reason)

    def search(self, plans: Sequence[PairPlan]) -> None:
        """Search pairs, each as soon as there is room for its engines; a pair whose engines do not start fails alone."""
        devices = find_devices(self._job.serving, self._store)
        settings = settled(self._job.serving, devices)
        pools = [
            self._stack.enter_context(RewardPool(model, device=devices.rewards))
            for model in self._checked.rewards
        ]
        room = make_room(plans, settings, pools)
        at_once = min(len(plans), room.pairs())
        groups = [pair_group(plan, settings, room.engine, groups=at_once) for plan in plans]
        with (
            Progress("search", self._status, rows="responses") as progress,
            http_proxy(settings) as (url, path),
            ingress(groups, url, path, settings),
        ):
            endpoint = Endpoint(url, key_variable=settings.api_key_env or KEY_VARIABLE)
            self._work_off([*zip(plans, groups, strict=True)], room, endpoint, progress)
            progress.finish(sorted(self.searches.failures))

    def _work_off(
        self,
        pairs: Sequence[tuple[PairPlan, EngineGroup]],
        room: SearchRoom,
        endpoint: Endpoint,
        progress: Progress,
    ) -> None:
        """Search all pairs, in their order, as many at a time as there is room for when one begins."""
        waiting, searching = deque(pairs), dict[Future[PairResult], PairPlan]()
        with ThreadPoolExecutor(len(pairs), "pair") as threads:
            while waiting or searching:
                while waiting and len(searching) < room.pairs():
                    plan, group = waiting.popleft()
                    future = threads.submit(self._start_and_search, plan, group, room, endpoint, progress)
                    searching[future] = plan
                done, _ = wait(searching, LOOK_FOR_ROOM_S if waiting else None, FIRST_COMPLETED)
                for future in done:
                    plan = searching.pop(future)
                    try:
                        self.searches.results[plan.name] = future.result()
                    except ExpoError as error:
                        self.searches.add_failure([plan], error)

    def _start_and_search(
        self,
        plan: PairPlan,
        group: EngineGroup,
        room: SearchRoom,
        endpoint: Endpoint,
        progress: Progress,
    ) -> PairResult:
        """Start the engines of a pair, search its alpha, and end them.

        Raises:
            ExpoError: if they do not start, or the search fails.
        """
        refuse_replaced_parents(plan)  # the last pairs begin hours after the check
        with closing(Engines(group, room.settings.start_timeout)) as engines:
            turn: AbstractContextManager[None] = nullcontext()
            if room.turns is None:
                engines.start()
            else:
                turn = Turn(room.turns, start=engines.start, end=engines.close)
            with turn:
                steps = group.replicas * endpoint.alphas_at_once(plan.name)
            evaluator = PairEvaluator(
                plan, endpoint.url, room.scorers, search_id=self._checked.search_id(plan), sampling=self._job.sampling, store=self._store, progress=progress,
                slots=group.slots(ask=room.engine is not None), at_once=steps, key_variable=endpoint.key_variable,
                turn=turn,
            )  # fmt: skip
            # The next step is asked while rewards of the last are made; by turns, a round is asked whole, then scored.
            at_once = steps + 1 if room.turns is None else WHOLE_ROUND
            try:
                return self._search_pair(plan, evaluator, at_once, progress)
            finally:
                with self._counting:
                    self.searches.num_tokens += evaluator.num_tokens

    def _search_pair(
        self, plan: PairPlan, evaluator: PairEvaluator, at_once: int, progress: Progress
    ) -> PairResult:
        """Choose alpha, and store the result.

        Args:
            at_once: steps that are asked and scored at the same time.
        """
        search_id = self._checked.search_id(plan)
        result = search_pair(
            plan, self._checked.prompts, self._job.search, evaluator,
            announce=lambda text: progress.note(plan.name, text),
            at_once=at_once,
            rung_log=RungLog(self._store, rungs_key(plan.name, search_id)),
            roles=Roles.of(self._job.rewards, self._job.search),
        )  # fmt: skip
        results = results_json(Results(self._store.uri, "", (result,)))
        self._store.put(search_key(plan.name, search_id), results)
        return result


def publish_winners(checked: CheckedJob, searches: Searches, status: StatusFile | None = None) -> Winners:
    """Publish the winners from the parents that were searched, with the search's results in their cards.

    What is published already is left alone. A pair that cannot be published is named among the failures, and the others are
    published.
    """
    started = time.monotonic()
    winners = Winners()
    if plans := _publication_plans(checked, searches, winners):
        _publish(checked, searches, plans, winners, status)
    winners.usage = _usage_since(started)
    return winners


def _publish(
    checked: CheckedJob,
    searches: Searches,
    plans: Sequence[PairPlan],
    winners: Winners,
    status: StatusFile | None,
) -> None:
    """Publish all plans on the cluster, and add the models and failures to `winners`."""

    def publish_with_result(plan: PairPlan, alpha: float) -> Published:
        return publish(ModelFolder(plan, alpha), searches.results[plan.name])

    with (
        Progress("extrapolate", status) as progress,
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
            plans.append(plan_publication(plan, pair, outputs))
        except ExpoError as error:
            winners.failures[pair.name] = in_one_line(error)
            log.error("%s failed: %s", pair.name, in_one_line(error))
    return plans


def _usage_since(started: float) -> Usage:
    """Time since `started`, multiplied by the CPUs and GPUs that the cluster has now."""
    seconds, resources = time.monotonic() - started, ray.cluster_resources()
    return Usage(seconds, seconds * resources.get("CPU", 0), seconds * resources.get("GPU", 0))

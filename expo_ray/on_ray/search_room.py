"""Room on the cluster for a search: how many pairs at a time, where their engines and the reward models run, who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import ray

from expo_ray.config import Serving
from expo_ray.errors import JobError
from expo_ray.evaluation.check_job import CheckedJob
from expo_ray.evaluation.gpu_needs import place_search, workers_of
from expo_ray.evaluation.placement import Place, describe
from expo_ray.evaluation.search.pair_evaluator import SharedScorer
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.on_ray.cluster import known_cluster
from expo_ray.on_ray.gpus import log_placement, read_nodes, this_machine
from expo_ray.on_ray.rewards.placement import ActorRoom, Turn
from expo_ray.on_ray.rewards.pool import RewardPool


@dataclass(frozen=True)
class SearchRoom:
    """Room for the engines of some pairs at the same time, and for all reward models.

    Attributes:
        pairs: number of pairs.
        scorers: the reward models, each with what it waits for.
        engine: place of the engines of each pair; None on CPUs.
    """

    pairs: int
    scorers: Sequence[SharedScorer]
    engine: Place | None = None


def make_room(plans: Sequence[PairPlan], settings: Serving, pools: Sequence[RewardPool]) -> SearchRoom:
    """Find out where everything runs, and tell the reward models.

    Raises:
        JobError: if the cluster cannot hold the engines of one pair and the reward models.
    """
    placement = place_search(plans, settings, [pool.checked for pool in pools], read_nodes())
    if placement is None:
        return SearchRoom(_pairs_on_cpus(settings, pools), [*map(SharedScorer, pools)])
    log_placement(placement)
    names = {place.need.name for place in placement.rewards}
    on_gpus = [pool for pool in pools if pool.name in names]
    together = ActorRoom(placement.rewards)
    for pool in on_gpus:
        pool.room = ActorRoom([placement.of(pool.name)]) if placement.turns else together
    scorers = share_scorers(pools, on_gpus if placement.turns else ())
    for engine in placement.engines:
        pairs = max(1, min(len(plans), engine.count // settings.replicas))
        return SearchRoom(pairs, scorers, replace(engine, count=engine.count // pairs))
    on_cpus = [pool for pool in pools if pool not in on_gpus]
    return SearchRoom(_pairs_on_cpus(settings, on_cpus), scorers)


def share_scorers(pools: Sequence[RewardPool], taking_turns: Sequence[RewardPool]) -> list[SharedScorer]:
    """Make scorers that all pairs of a search use; of those that take turns, one at a time is loaded."""
    lock = threading.Lock()
    return [
        SharedScorer(pool, Turn(lock, [other for other in taking_turns if other is not pool]))
        if pool in taking_turns
        else SharedScorer(pool)
        for pool in pools
    ]


def _pairs_on_cpus(settings: Serving, pools: Sequence[RewardPool]) -> int:
    """Number of pairs whose engines fit on the cluster's CPUs at the same time, beside the reward models.

    Raises:
        JobError: if not even one does.
    """
    cpus = ray.cluster_resources().get("CPU", 0)
    per_pair = settings.replicas * workers_of(settings)
    for_rewards = sum(pool.spec.replicas * pool.spec.num_cpus for pool in pools)
    pairs = int((cpus - for_rewards) // per_pair)
    if pairs < 1:
        raise JobError(
            f"the cluster has {cpus:g} CPUs; the engines of one pair take {per_pair} and the reward models {for_rewards:g}; add "
            "nodes, or lower `replicas` under `serving` or `num_cpus` under `rewards`"
        )
    return pairs


def describe_room(checked: CheckedJob) -> str:
    """Describe where the engines and reward models of a job would run: on the cluster that is up, else on this machine.

    Raises:
        JobError: if its GPUs cannot hold them.
    """
    with known_cluster() as is_up:
        nodes, where = (read_nodes(), "the cluster") if is_up else ([this_machine()], "this machine")
    placement = place_search(checked.plans, checked.job.serving, checked.rewards, nodes)
    if placement is None:
        return f"engines and reward models run on the CPUs of {where}"
    lines = [f"on the GPUs of {where}:", *(f"  {line}" for line in describe(placement))]
    for number, node in enumerate(placement.gpus, 1):
        for index, held in enumerate(node):
            contents = ", ".join(f"{name} {share / 100:g}" for name, share in held)
            lines.append(f"  node {number}, GPU {index}: {contents or 'free'}")
    return "\n".join(lines)

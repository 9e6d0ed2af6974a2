"""Room on the cluster for a search: how many pairs at a time, where their engines and the reward models run, who waits for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from expo_ray.config import Serving
from expo_ray.errors import ExpoError, JobError
from expo_ray.evaluation.check_job import CheckedJob
from expo_ray.evaluation.gpu_needs import place_search, scores_on_gpus, workers_of
from expo_ray.evaluation.placement import Node, Place, Placement, describe, place
from expo_ray.evaluation.search.pair_evaluator import SharedScorer
from expo_ray.evaluation.turns import Turn, Turns
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.on_ray.capacity import await_room, cluster_nodes, find_devices, settled
from expo_ray.on_ray.cluster import known_cluster
from expo_ray.on_ray.gpus import log_placement, this_machine
from expo_ray.on_ray.rewards.memory import check_memory
from expo_ray.on_ray.rewards.placement import ActorRoom
from expo_ray.on_ray.rewards.pool import RewardPool
from expo_ray.storage import open_store


@dataclass(frozen=True)
class SearchRoom:
    """Room for the engines of some pairs at the same time, and for all reward models.

    Attributes:
        settings: of the engines, their device settled.
        scorers: the reward models, each with what it waits for.
        engine: place of the engines of each pair; None on CPUs.
        rewards: places of the reward models on GPUs.
        for_rewards: CPUs that the reward models on CPUs take.
        turns: of the engines with the reward models, where the GPUs hold one at a time; else None.
    """

    settings: Serving
    scorers: Sequence[SharedScorer]
    engine: Place | None
    rewards: Sequence[Place]
    for_rewards: float
    turns: Turns | None = None

    def pairs(self) -> int:
        """Count the pairs whose engines have room at the same time on the nodes that are up now or can be added; at least 1."""
        try:
            return self._pairs_on(cluster_nodes())
        except ExpoError:  # nodes were lost; others may come
            return 1

    def _pairs_on(self, nodes: Sequence[Node]) -> int:
        if self.engine is None:
            return pairs_on_cpus(self.settings, self.for_rewards, nodes)
        if self.turns is not None:
            return 1
        need, workers = self.engine.need, self.engine.need.workers
        most = sum(node.gpus for node in nodes) * 100 // (self.engine.share * workers)
        # As they were placed: those that run keep their shares.
        engines = replace(need, share=self.engine.share, most=max(1, most))
        rewards = [
            replace(taken.need, share=taken.share, least=taken.count, most=taken.count)
            for taken in self.rewards
        ]
        (placed,) = place([engines], rewards, nodes).engines
        return max(1, placed.count // self.engine.count)


def make_room(plans: Sequence[PairPlan], settings: Serving, pools: Sequence[RewardPool]) -> SearchRoom:
    """Wait until there is room for the engines of one pair and the reward models; decide who runs where, and tell the latter.

    Args:
        settings: whose device is settled.

    Raises:
        ExpoError: if the cluster does not come to have room in time.
    """
    on_gpus = [pool for pool in pools if pool.on_gpus]
    for_rewards = sum(pool.spec.replicas * pool.spec.num_cpus for pool in pools if not pool.on_gpus)

    def find(nodes: Sequence[Node]) -> Placement | None:
        check_memory([pool.need for pool in pools])
        if settings.device == "cpu":
            pairs_on_cpus(settings, for_rewards, nodes)
        return place_search(plans, settings, [pool.checked for pool in on_gpus], nodes)

    placement = await_room(find, settings.start_timeout)
    if placement is None:
        return SearchRoom(settings, [*map(SharedScorer, pools)], None, (), for_rewards)
    log_placement(placement)
    together = ActorRoom(placement.rewards)
    for pool in on_gpus:
        pool.room = ActorRoom([placement.of(pool.name)]) if placement.turns else together
    turns = Turns()
    scorers = share_scorers(pools, on_gpus if placement.turns else (), turns)
    engine, by_turns = next(iter(placement.engines), None), placement.turns == "all"
    if engine is not None:
        pairs = 1 if by_turns else max(1, min(len(plans), engine.count // settings.replicas))
        engine = replace(engine, count=min(settings.max_replicas or settings.replicas, engine.count // pairs))
    return SearchRoom(settings, scorers, engine, placement.rewards, for_rewards, turns if by_turns else None)


def share_scorers(
    pools: Sequence[RewardPool], taking_turns: Sequence[RewardPool], turns: Turns
) -> list[SharedScorer]:
    """Make scorers that all pairs of a search use; of those that take turns, one at a time is loaded."""
    return [
        SharedScorer(pool, Turn(turns, end=pool.close)) if pool in taking_turns else SharedScorer(pool)
        for pool in pools
    ]


def pairs_on_cpus(settings: Serving, for_rewards: float, nodes: Sequence[Node]) -> int:
    """Count the pairs whose engines fit on the CPUs of nodes at the same time, beside the reward models.

    Raises:
        JobError: if not even one does.
    """
    cpus = sum(node.cpus for node in nodes)
    per_pair = settings.replicas * workers_of(settings)
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
        JobError: if this machine cannot hold them.
    """
    with known_cluster() as is_up:
        where = "the cluster" if is_up else "this machine"
        nodes = cluster_nodes() if is_up else [this_machine()]
    devices = find_devices(checked.job.serving, open_store(checked.job.output), nodes, keep=False)
    settings = settled(checked.job.serving, devices)
    rewards = [
        reward for reward in checked.rewards if scores_on_gpus(reward.spec, reward.model, devices.rewards)
    ]
    try:
        placement = place_search(checked.plans, settings, rewards, nodes)
    except ExpoError as error:
        if not is_up:
            raise
        minutes = settings.start_timeout / 60
        return f"the cluster has no room yet, and a run waits {minutes:.0f} min for it: {error}"
    if placement is None:
        return f"engines and reward models run on the CPUs of {where}"
    lines = [f"on the GPUs of {where}:", *(f"  {line}" for line in describe(placement))]
    for number, node in enumerate(placement.gpus, 1):
        for index, held in enumerate(node):
            contents = ", ".join(f"{name} {share / 100:g}" for name, share in held)
            lines.append(f"  node {number}, GPU {index}: {contents or 'free'}")
    return "\n".join(lines)

"""Clusters of several nodes on this machine whose GPUs Ray is told of and that are not there; actors that are placed on them are real.

`python -m tests.support.declared_nodes SCENARIO [JSON]` prints a line of JSON for each thing it saw.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from expo_ray.config import RewardModel, Serving
from expo_ray.errors import ExpoError
from expo_ray.evaluation.placement import Need, Place, Placement, place
from expo_ray.evaluation.rewards.reward_model import Classifier, check_reward
from expo_ray.evaluation.turns import Turns
from expo_ray.on_ray import capacity, gpus
from expo_ray.on_ray.rewards import crew
from expo_ray.on_ray.rewards.placement import ActorRoom
from expo_ray.on_ray.rewards.pool import RewardPool
from expo_ray.on_ray.search_room import share_scorers

WAIT_S = 200.0
GB = 10**9


def show(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class Nodes:
    """A head without CPUs or GPUs that this process is connected to, and nodes that come and go."""

    def __init__(self) -> None:
        # Ray leaves its address there, and takes for granted that the folder is.
        Path(os.environ["RAY_TMPDIR"], "ray").mkdir(exist_ok=True)
        folder = tempfile.mkdtemp(prefix="dn-", dir=os.environ["RAY_TMPDIR"])
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "node_ip_address": "127.0.0.1",
                "temp_dir": folder,
                "include_dashboard": False,
            },
        )
        ray.init(address=self._cluster.address, log_to_driver=False)

    def add(self, num_gpus: int, num_cpus: int = 16) -> Any:
        return self._cluster.add_node(
            num_cpus=num_cpus, num_gpus=num_gpus, node_ip_address="127.0.0.1", object_store_memory=80 << 20
        )

    def remove(self, node: Any) -> None:
        self._cluster.remove_node(node)


@ray.remote
class Worker:
    """Holds what it was given, and says what that is."""

    def where(self) -> tuple[str, list[str]]:
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"]


def start(taken: Place, strategies: Sequence[PlacementGroupSchedulingStrategy], num_gpus: float) -> list[Any]:
    options = [{"num_gpus": num_gpus, "num_cpus": 0, "scheduling_strategy": each} for each in strategies]
    workers: Any = Worker
    return [workers.options(**each).remote() for each in options]


def take_engines(taken: Place) -> tuple[list[Any], list[Any]]:
    """Take room for all engines of a place in the way Serve and vLLM's executor do; returns groups and workers."""
    from expo_ray.on_ray.serving.engine_settings import _gpu_placement

    groups, workers = [], []
    for _ in range(taken.count):
        config = _gpu_placement(taken)["placement_group_config"]
        group = placement_group(config["bundles"], strategy=config["strategy"])
        if not group.wait(WAIT_S):
            raise TimeoutError(f"no room for an engine of {taken.need.name}: {placement_group_table(group)}")
        groups.append(group)
        bundles = range(taken.need.workers)
        workers += start(
            taken, [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=n) for n in bundles], taken.gpus
        )  # fmt: skip
    return groups, workers


def contents(
    workers: Mapping[str, Sequence[Any]], shares: Mapping[str, int]
) -> dict[str, dict[str, list[Any]]]:
    """What each GPU of each node holds, as names and hundredths."""
    held: dict[str, dict[str, list[Any]]] = {}
    for name, actors in workers.items():
        for node, ids in ray.get([actor.where.remote() for actor in actors], timeout=WAIT_S):
            for card in ids:
                held.setdefault(node, {}).setdefault(card, []).append([name, shares[name]])
    return held


def place_really(placement: Placement) -> list[Any]:
    """Start an actor for each worker of a placement, each reward model in its turn if they take turns; what GPUs hold each time."""
    shares = {taken.need.name: taken.share for taken in (*placement.engines, *placement.rewards)}
    groups: list[Any] = []
    engines: dict[str, list[Any]] = {}
    for taken in placement.engines:
        more, engines[taken.need.name] = take_engines(taken)
        groups += more
    rooms = [placement.rewards] if not placement.turns else [[taken] for taken in placement.rewards]
    seen = []
    if placement.turns == "all":
        seen.append(contents(engines, shares))
        for group in groups:
            remove_placement_group(group)
        engines, groups = {}, []
    for places in rooms:
        room, rewards = ActorRoom(places), dict[str, list[Any]]()
        for taken in places:
            entered = room.enter(taken.need.name)
            rewards[taken.need.name] = start(taken, entered, taken.gpus * taken.need.workers)
        seen.append(contents(engines | rewards, shares))
        for taken in places:
            room.leave(taken.need.name)
    for group in groups:
        remove_placement_group(group)
    return seen


def placements(cases: Sequence[Mapping[str, Any]]) -> None:
    """Place engines and reward models of several cases, each on nodes of its own."""
    nodes = Nodes()
    for case in cases:
        size = case["gpu_bytes"]
        gpus.smallest_gpu_bytes = lambda size=size: size  # type: ignore[misc]
        added = [nodes.add(many) for many in case["gpus"]]
        placement = place(
            [Need(**need) for need in case["engines"]], [Need(**need) for need in case["rewards"]], gpus.read_nodes()
        )  # fmt: skip
        planned = [[sorted(card) for card in node] for node in placement.gpus]
        show(turns=placement.turns, planned=planned, really=place_really(placement))
        for node in added:
            nodes.remove(node)


class Actor(crew.RewardActor):
    """Computes on a CPU what it was given a GPU for, and says which others live while it loads."""

    def __init__(self, model: Any, dtype: str, num_gpus: float) -> None:
        super().__init__(model, dtype, 0)
        self._given = num_gpus

    def load(self, probe: Sequence[Sequence[int]], compares: bool = False) -> str:
        file = Path(os.environ["ACTORS"])
        before = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        living = sorted({line["name"] for line in before if psutil.pid_exists(line["pid"])})
        name = super().load(probe, compares)
        ids = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        assert isinstance(self._model, Classifier)
        line = {"name": self._model.spec.name, "pid": os.getpid(), "gpus": ids, "share": self._given}
        with file.open("a") as lines:
            lines.write(json.dumps(line | {"living": living}) + "\n")
        return name


def turns(folders: Sequence[str]) -> None:
    """Score by two reward models that do not fit on the GPU together, by turns and from two threads; then leave the GPU."""
    from tests.support.tiny_reward_models import english

    nodes = Nodes()
    nodes.add(num_gpus=1)
    crew.RewardActor = Actor  # type: ignore[misc]
    specs = [RewardModel(model=folder, name=Path(folder).name, backend="transformers", dtype="fp32") for folder in folders]  # fmt: skip
    pools = [RewardPool(check_reward(spec), device="cuda") for spec in specs]
    for each in pools:
        each.room = ActorRoom([Place(Need(each.name, GB, cpus=1), 1, 60)])
    scorers = share_scorers(pools, pools, Turns())
    texts = english(24, 200)

    def score(number: int, first: int) -> None:
        shared, asked = scorers[number], texts[first : first + 8]
        with shared.turn:
            rewards = [
                reward for batch in shared.scorer.score(shared.scorer.inputs(asked)) for reward in batch
            ]
        show(name=pools[number].name, first=first, rewards={reward.prompt_id: reward.reward for reward in rewards})  # type: ignore[union-attr]  # fmt: skip

    for first in (0, 8):
        threads = [threading.Thread(target=score, args=(number, first)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for each in pools:
        each.close()
    deadline = time.monotonic() + WAIT_S
    while ray.available_resources().get("GPU", 0) < 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    show(free=ray.available_resources().get("GPU", 0))


def late() -> None:
    """Look for room for an engine while the GPU node is late, on a cluster whose CPU nodes are up."""
    nodes = Nodes()
    nodes.add(num_gpus=0)
    vars(capacity)["engine_built_for_gpus"] = lambda: True
    gpus.smallest_gpu_bytes = lambda: 80 * GB
    capacity.TELL_S = 1.0
    devices = capacity.find_devices(Serving())
    show(devices=[devices.engines, devices.rewards])
    engine = Need("engine", 14 * GB)
    try:
        capacity.await_room(lambda there: place([engine], (), there), 3)
    except ExpoError as error:
        show(refused=str(error))
    planned: list[Placement] = []
    waits = threading.Thread(
        target=lambda: planned.append(capacity.await_room(lambda there: place([engine], (), there), WAIT_S))
    )
    waits.start()
    time.sleep(4)
    nodes.add(1)  # a node can be started by the main thread alone
    waits.join()
    show(places=[(taken.need.name, taken.count, taken.share) for taken in planned[0].engines])


def join(address: str, num_cpus: int) -> None:
    """Join a cluster on loopback as a node without GPUs, which `ray start` refuses to do there, until this process is ended."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    parameters = RayParams(
        gcs_address=address, redis_address=address, node_ip_address="127.0.0.1", num_cpus=num_cpus, num_gpus=0,
        resources={"shard_io": num_cpus}, object_store_memory=80 << 20, min_worker_port=0, max_worker_port=0,
        dashboard_agent_listen_port=None, node_manager_port=0,
    )  # fmt: skip
    Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=True)
    show(joined=num_cpus)
    signal.pause()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    scenarios: Mapping[str, Callable[..., None]] = {
        "placements": placements,
        "turns": turns,
        "late": late,
        "join": join,
    }
    scenarios[sys.argv[1]](*map(json.loads, sys.argv[2:]))

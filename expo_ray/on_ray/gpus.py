"""GPUs of the connected cluster: how many each node has, how large they are, and who may start on them now."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
from ray._private.thirdparty import pynvml
from ray._private.utils import get_num_cpus
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from expo_ray.evaluation.placement import Node, Placement, describe

log = logging.getLogger("expo_ray")

# A node that does not answer for so long is taken to have GPUs of unknown size.
_ANSWER_S = 60.0


def read_nodes() -> list[Node]:
    """Ask every node of the cluster for its GPUs and their memory."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0, max_retries=0)(smallest_gpu_bytes)
    asked = {
        node["NodeID"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in alive
        if node["Resources"].get("GPU")
    }
    if asked:
        ray.wait([*asked.values()], num_returns=len(asked), timeout=_ANSWER_S)
    nodes = []
    for node in alive:
        resources, size = node["Resources"], None
        if answer := asked.get(node["NodeID"]):
            with suppress(RayError):
                size = ray.get(answer, timeout=0)
            if size is None:
                log.warning(
                    "%s: the memory of its GPUs is unknown, so that nothing shares one of them",
                    node["NodeManagerAddress"],
                )
        nodes.append(Node(int(resources.get("GPU", 0)), size, resources.get("CPU", 0)))
    return nodes


def this_machine() -> Node:
    """The GPUs and CPUs of this machine, as a Ray that is started on it counts them."""
    gpus = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    many = gpus if visible is None else min(gpus, len(visible))
    return Node(many, smallest_gpu_bytes() if many else None, get_num_cpus(override_docker_cpu_warning=True))


def log_placement(placement: Placement) -> None:
    """Log a line for each engine and reward model, and one that says who waits for whom."""
    for line in describe(placement):
        log.info("%s", line)


def smallest_gpu_bytes() -> int | None:
    """Memory of this machine's smallest GPU; None if the driver does not say, or the GPUs are divided (MIG).

    By NVML, so that a task needs no GPU of its own, and no context is made that takes memory.
    """
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        if any(map(_is_divided, handles)):
            return None
        return min((int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles), default=None)
    except pynvml.NVMLError:
        return None


def _is_divided(handle: object) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:  # this kind of GPU cannot be
        return False


@contextmanager
def starting_alone(shared: bool) -> Iterator[None]:
    """Wait until nothing else starts on the GPUs of this machine, where they are shared; the block is one start.

    vLLM measures the whole GPU's free memory while it starts. What another process takes meanwhile is counted as its own, and what
    one frees ends it (the assertion in `gpu_worker.determine_available_memory`).
    """
    if not shared:
        yield
        return
    path = os.path.join(tempfile.gettempdir(), f"expo-ray-gpus-{os.getuid()}.lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a forked child may have it, too
        os.close(lock)

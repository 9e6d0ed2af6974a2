"""Placement of the actors of a reward model: resources of each, nodes that are large enough, the data type that fits."""

from __future__ import annotations

import logging

import ray

from expo_ray.config import RewardModel
from expo_ray.errors import RewardError
from expo_ray.evaluation.rewards.reward_function import RewardFunction
from expo_ray.evaluation.rewards.reward_model import Classifier

log = logging.getLogger("expo_ray")

# What fp32 weights may take of the memory, as activations and caches need some, too.
_MEMORY_SHARE = 0.75


def gpu_share(spec: RewardModel, model: Classifier | RewardFunction) -> float:
    """GPUs of one actor: as in the job, else 1 if the cluster has any and it is a model, 0 for a function."""
    if spec.num_gpus is not None:
        return spec.num_gpus
    on_gpu = isinstance(model, Classifier) and ray.cluster_resources().get("GPU", 0) > 0
    return 1.0 if on_gpu else 0.0


def check_room(spec: RewardModel, num_gpus: float) -> None:
    """Refuse actors that no node is large enough for. Without any node none is refused: an autoscaled cluster may get some.

    Raises:
        RewardError: if there are nodes, and none is large enough.
    """
    wanted = {"CPU": spec.num_cpus, "GPU": num_gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= many for name, many in wanted.items()) for node in nodes):
        return
    most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
    if any(most.values()):
        raise RewardError(
            f"{spec.name}: an actor wants {wanted['CPU']:g} CPU(s) and {wanted['GPU']:g} GPU(s), and no node has both "
            f"(the largest have {most['CPU']:g} and {most['GPU']:g}); lower `num_cpus` or `num_gpus`"
        )


def choose_dtype(model: Classifier, num_gpus: float) -> str:
    """Ask the cluster for its memory, and choose fp32 if the weights fit, else 16 bits: as stored, or bf16."""
    if num_gpus:
        room = ray.get(ray.remote(num_gpus=num_gpus)(_gpu_bytes).remote()) * min(num_gpus, 1)
    else:
        memories = [
            node["Resources"].get("memory", 0) / min(model.spec.replicas, _at_once(node["Resources"], model))
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= model.spec.num_cpus
        ]
        room = max(memories, default=0)
    if 4 * model.numel <= room * _MEMORY_SHARE:
        return "fp32"
    log.warning(
        "%s: fp32 weights do not fit into %.1f GB; scored in 16 bits", model.uri, room * _MEMORY_SHARE / 1e9
    )
    return "fp16" if model.stored == "fp16" else "bf16"


def _at_once(resources: dict[str, float], model: Classifier) -> int:
    """Actors that one node can hold."""
    return max(1, int(resources["CPU"] // model.spec.num_cpus))


def _gpu_bytes() -> int:
    """Memory in bytes of the first GPU of this task."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)

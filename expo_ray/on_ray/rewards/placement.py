"""Placement of the actors of a reward model: resources of each, and nodes that are large enough."""

from __future__ import annotations

import ray

from expo_ray.config import RewardModel
from expo_ray.errors import RewardError
from expo_ray.evaluation.rewards.reward_function import RewardFunction
from expo_ray.evaluation.rewards.reward_model import Classifier


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

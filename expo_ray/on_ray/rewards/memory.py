"""Main memory for reward models: what cannot fit is refused before it is downloaded. For GPUs, see `evaluation.placement`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from expo_ray.errors import Collected, RewardError
from expo_ray.evaluation.rewards.reward_model import DTYPE_BYTES, CheckedReward, Classifier
from expo_ray.on_ray.capacity import node_groups
from expo_ray.progress import size_text


@dataclass(frozen=True)
class ActorNeed:
    """A reward model and what each of its actors takes. Of memory it takes its weights at least, and that is what counts here.

    Attributes:
        num_gpus: of each.
    """

    checked: CheckedReward
    num_gpus: float

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in the data type that it computes in; 0 for a function."""
        model = self.checked.model
        return model.numel * DTYPE_BYTES[self.checked.dtype] if isinstance(model, Classifier) else 0

    @property
    def reserved_bytes(self) -> int:
        """Main memory that an actor holds to its end. One on a GPU has its weights there."""
        return 0 if self.num_gpus else self.weight_bytes

    def fits_on(self, node: Mapping[str, float]) -> bool:
        """True if a node has the CPUs and GPUs of an actor."""
        return node.get("CPU", 0) >= self.checked.spec.num_cpus and node.get("GPU", 0) >= self.num_gpus


def check_memory(needs: Sequence[ActorNeed]) -> None:
    """Refuse reward models that certainly have no room on any node that is up, or that the autoscaler can add.

    Without such a node nothing is refused.

    Raises:
        Problems: with every model that does not fit.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    groups = _node_groups()
    problems = Collected()
    for need in needs:
        with problems.catching():
            _check_host(need, [node["Resources"] for node in nodes], groups)
    if not groups:
        with problems.catching():
            _check_together(needs, [node["Resources"] for node in nodes])
    problems.raise_any()


def _check_host(
    need: ActorNeed, nodes: Sequence[Mapping[str, float]], groups: Sequence[Mapping[str, float]]
) -> None:
    """Compare the weights with the main memory of the largest node. On GPUs, too: the reference passes through it.

    Raises:
        RewardError: if they are larger.
    """
    rooms = [node.get("memory", 0) for node in nodes if need.fits_on(node)]
    rooms += [group.get("memory") or float("inf") for group in groups if need.fits_on(group)]
    if rooms and need.weight_bytes > max(rooms):
        raise RewardError(
            f"{_weights(need)}, and the largest node has {size_text(int(max(rooms)))} of memory for Ray; {_smaller(need)}add a larger "
            "node, or give a smaller model"
        )


def _check_together(needs: Sequence[ActorNeed], nodes: Sequence[Mapping[str, float]]) -> None:
    """Compare all actors on CPUs with the main memory of all nodes.

    Raises:
        RewardError: if they take more.
    """
    held = [need for need in needs if need.reserved_bytes]
    rooms = [node.get("memory", 0) for node in nodes if any(need.fits_on(node) for need in held)]
    wanted = sum(need.checked.spec.replicas * need.reserved_bytes for need in held)
    if rooms and wanted > sum(rooms):
        actors = ", ".join(
            f"{need.checked.spec.replicas} of {need.checked.spec.name} with {size_text(need.reserved_bytes)} each" for need in held
        )  # fmt: skip
        raise RewardError(
            f"the weights of all reward actors take {size_text(wanted)} ({actors}), and the nodes have {size_text(int(sum(rooms)))} of "
            "memory for Ray; lower `replicas`, set `dtype: bf16`, or add nodes"
        )


def _weights(need: ActorNeed) -> str:
    return (
        f"{need.checked.spec.name}: its weights take {size_text(need.weight_bytes)} in {need.checked.dtype}"
    )


def _smaller(need: ActorNeed) -> str:
    return "set `dtype: bf16`, " if need.checked.dtype == "fp32" else ""


def _node_groups() -> list[Mapping[str, float]]:
    """Resources of a node of each kind that the autoscaler can add; empty without an autoscaler."""
    return [resources for resources, _ in node_groups()]

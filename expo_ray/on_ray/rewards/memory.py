"""Memory for reward models: what cannot fit is refused before it is downloaded."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
import ray._private.state
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from expo_ray.errors import Collected, RewardError
from expo_ray.evaluation.rewards.reward_model import DTYPE_BYTES, CheckedReward, Classifier
from expo_ray.on_ray.rewards.backends import GPU_MEMORY_SHARE
from expo_ray.progress import size_text

# A node that has not answered by then is not counted on.
_ANSWER_TIMEOUT_S = 60.0
_QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


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
            if need.num_gpus and not any(map(need.fits_on, groups)):  # of a group's cards nothing is known
                _check_cards(need, nodes)
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


def _check_cards(need: ActorNeed, nodes: Sequence[Mapping[str, object]]) -> None:
    """Compare the weights with the memory of the largest GPU; a node whose driver does not say is not counted.

    Raises:
        RewardError: if they are larger.
    """
    matching = [
        node for node in nodes if isinstance(node["Resources"], dict) and need.fits_on(node["Resources"])
    ]
    cards = _ask_cards([str(node["NodeID"]) for node in matching])
    if not cards or 0 in cards:
        return
    room = GPU_MEMORY_SHARE * min(need.num_gpus, 1) * max(cards)
    parts = max(1, int(need.num_gpus))
    if need.weight_bytes / parts <= room:
        return
    raise RewardError(
        f"{_weights(need)}, {size_text(need.weight_bytes // parts)} on each GPU at `num_gpus: {need.num_gpus:g}`, where it may fill "
        f"{size_text(int(room))}: the largest GPU has {size_text(max(cards))}; {_smaller(need)}{_larger_split(need, max(cards))}"
    )


def _weights(need: ActorNeed) -> str:
    return (
        f"{need.checked.spec.name}: its weights take {size_text(need.weight_bytes)} in {need.checked.dtype}"
    )


def _smaller(need: ActorNeed) -> str:
    return "set `dtype: bf16`, " if need.checked.dtype == "fp32" else ""


def _larger_split(need: ActorNeed, card: int) -> str:
    """The number of GPUs that the weights fit on, as a remedy."""
    model = need.checked.model
    assert isinstance(model, Classifier)
    for parts in range(1, model.heads + 1):
        if model.heads % parts == 0 and need.weight_bytes / parts <= GPU_MEMORY_SHARE * card:
            return f"set `num_gpus: {parts}`, or add larger GPUs"
    return "add larger GPUs, or give a smaller model"


def _node_groups() -> list[Mapping[str, float]]:
    """Resources of a node of each kind that the autoscaler can add; empty without an autoscaler."""
    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    return [dict(group.resources) for group in groups if group.max_count != 0]


def _ask_cards(node_ids: Sequence[str]) -> list[int]:
    """Memory in bytes of the largest GPU of each node, 0 where that is unknown. Asks for no GPU: all may be in use."""
    ask = ray.remote(num_cpus=0, max_retries=0)(_card_bytes)
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
        for node_id in node_ids
    ]
    try:
        cards: list[int] = ray.get(asked, timeout=_ANSWER_TIMEOUT_S)
    except (GetTimeoutError, RayError):
        return []
    return cards


def _card_bytes() -> int:
    """Memory in bytes of the largest GPU of this machine, 0 if its driver does not say. CUDA shows none to a task without a GPU."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True)
        return max(int(line) for line in done.stdout.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0

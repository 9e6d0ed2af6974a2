"""Placement of the actors of a reward model: resources of each, and nodes that are large enough."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from expo_ray.config import RewardModel
from expo_ray.errors import RewardError
from expo_ray.evaluation.placement import Node, Place


class ActorRoom:
    """Room on GPUs for the actors of some reward models, on as few nodes as possible, so that engines find whole nodes.

    It is taken when the first actor starts, and given back when no reward model uses it any more.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = {place.need.name: place for place in places}
        self._group: PlacementGroup | None = None
        self._users: set[str] = set()
        self._lock = threading.Lock()

    def place(self, name: str) -> Place:
        """The place of a reward model."""
        return self._places[name]

    def enter(self, name: str) -> Sequence[PlacementGroupSchedulingStrategy]:
        """Take the room, unless another reward model has; returns where each actor of `name` is to be scheduled."""
        with self._lock:
            if self._group is None:
                bundles = [_bundle(place) for place in self._places.values() for _ in range(place.count)]
                self._group = placement_group(bundles, strategy="PACK")
            self._users.add(name)
            before = [place.count for place in self._places.values()]
            first = sum(before[: [*self._places].index(name)])
            return [
                PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=first + number)
                for number in range(self._places[name].count)
            ]

    def leave(self, name: str) -> None:
        """Give the room back, unless another reward model is in it."""
        with self._lock:
            self._users.discard(name)
            if self._group is not None and not self._users:
                remove_placement_group(self._group)
                self._group = None


def _bundle(place: Place) -> dict[str, float]:
    return {"GPU": place.gpus * place.need.workers, "CPU": place.need.cpus}


def check_room(spec: RewardModel, nodes: Sequence[Node]) -> None:
    """Refuse actors on CPUs that no node is large enough for.

    Raises:
        RewardError: if none is.
    """
    most = max((node.cpus for node in nodes), default=0)
    if spec.num_cpus > most:
        raise RewardError(
            f"{spec.name}: an actor wants {spec.num_cpus:g} CPU(s), and the largest node has {most:g}; lower `num_cpus`, or add nodes"
        )

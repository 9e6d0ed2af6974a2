"""A reward model that the pairs of a search share: its actors start with the first text to score, and end with the search."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from expo_ray.config import Serving
from expo_ray.evaluation.devices import SettledDevice
from expo_ray.evaluation.gpu_needs import reward_need, scores_on_gpus
from expo_ray.evaluation.placement import Node, Placement, place
from expo_ray.evaluation.records import Response, Reward
from expo_ray.evaluation.rewards.reward_inputs import RewardInput, ScoreFailure
from expo_ray.evaluation.rewards.reward_model import (
    CheckedReward,
)
from expo_ray.on_ray.capacity import await_room, usual_devices
from expo_ray.on_ray.gpus import log_placement
from expo_ray.on_ray.rewards.backends import PARITY_TEXTS
from expo_ray.on_ray.rewards.crew import Crew
from expo_ray.on_ray.rewards.memory import ActorNeed, check_memory
from expo_ray.on_ray.rewards.placement import ActorRoom, check_room

log = logging.getLogger("expo_ray")

BATCH_ROWS = 64


class RewardPool:
    """A reward model on Ray actors; see `expo_ray.evaluation.rewards.score_missing.NamedScorer`.

    Nothing is loaded before something is to be scored. The actors (`Crew`) stay until the pool is closed. Several threads may
    score at the same time, as the pairs of a search do.

    Args:
        room: of the actors on GPUs; as if they had all GPUs for themselves unless given.
        device: that reward models compute on, where the job file does not say; by the connected cluster unless given.

    Attributes:
        start_timeout: longest time in seconds to wait for machines.
    """

    start_timeout = Serving().start_timeout

    def __init__(
        self, checked: CheckedReward, room: ActorRoom | None = None, device: SettledDevice | None = None
    ) -> None:
        self.room, self._device = room, device
        self.checked, self.spec, self.model = checked, checked.spec, checked.model
        self._crew: Crew | None = None
        self._starting, self._reading = threading.Lock(), threading.Lock()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def id(self) -> str:
        return self.checked.id

    @property
    def about(self) -> Mapping[str, Any]:
        return self.checked.about

    @property
    def on_gpus(self) -> bool:
        """True if the actors compute on GPUs."""
        if self._device is None:
            self._device = usual_devices().rewards
        return scores_on_gpus(self.spec, self.model, self._device)

    @property
    def need(self) -> ActorNeed:
        """What each actor takes of the connected cluster, where it has a whole GPU if it has any."""
        return ActorNeed(self.checked, (self.spec.num_gpus or 1.0) if self.on_gpus else 0.0)

    def check_room(self) -> None:
        """Wait for room for an actor, and refuse the model if the connected cluster does not come to have any.

        Raises:
            ExpoError: if no node has room, as far as that can be known before the model is downloaded.
        """
        await_room(self._find_room, self.start_timeout)

    def _find_room(self, nodes: Sequence[Node]) -> Placement | None:
        """Find a place on GPUs for the actors; None if they run on CPUs, and there is room.

        Raises:
            ExpoError: if there is no room.
        """
        check_memory([self.need])
        if self.on_gpus:
            return place((), [reward_need(self.spec, self.model, self.checked.dtype)], nodes)
        check_room(self.spec, nodes)
        return None

    def inputs(self, responses: Sequence[Response]) -> list[RewardInput]:
        with self._reading:  # a tokenizer is not made for several threads
            return self.checked.inputs(responses)

    def score(self, inputs: Sequence[RewardInput]) -> Iterator[Sequence[Reward | ScoreFailure]]:
        if not inputs:
            return
        # The longest first: what does not fit into memory fails early, and no long batch is left to run alone at the end.
        ordered = sorted(inputs, key=lambda asked: len(asked.ids) or len(asked.text), reverse=True)
        with self._starting:
            if self._crew is None:
                self._crew = self._start_crew(_probe(ordered))
            crew = self._crew
        size = max(1, min(BATCH_ROWS, -(-len(ordered) // (2 * crew.size))))
        yield from crew.work_off(ordered[first : first + size] for first in range(0, len(ordered), size))

    def _start_crew(self, probe: Sequence[Sequence[int]]) -> Crew:
        """Start the actors: on GPUs where their room is, on CPUs on as many nodes as there are."""
        if self.room is None:
            placement = await_room(self._find_room, self.start_timeout)
            if placement is None:
                return Crew(self.need, probe, ["SPREAD"] * self.spec.replicas)
            log_placement(placement)
            self.room = ActorRoom(placement.rewards)
        taken = self.room.place(self.name)
        shared = ActorNeed(self.checked, taken.gpus * taken.need.workers)
        return Crew(shared, probe, self.room.enter(self.name))

    def close(self) -> None:
        """End the actors."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None
        if self.room is not None:
            self.room.leave(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _probe(ordered: Sequence[RewardInput]) -> list[Sequence[int]]:
    """Texts of all lengths, evenly spaced in `ordered`."""
    many = min(PARITY_TEXTS, len(ordered))
    return [ordered[number * (len(ordered) - 1) // max(many - 1, 1)].ids for number in range(many)]

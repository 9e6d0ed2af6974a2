"""Actors that share the scoring of one reward model: who is ready, who has been given what, who has to be replaced."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from expo_ray.config import RewardModel
from expo_ray.errors import ExpoError, InputChanged, RewardError
from expo_ray.evaluation.records import Reward
from expo_ray.evaluation.rewards.reward_function import (
    RewardFunction,
    ScoreFailure,
    checked_reward,
    function_scorer,
)
from expo_ray.evaluation.rewards.reward_inputs import RewardInput
from expo_ray.evaluation.rewards.reward_model import Classifier, inspect_reward_model
from expo_ray.on_ray.rewards.backends import load_backend
from expo_ray.serving.node_cache import download_model
from expo_ray.text import shown

log = logging.getLogger("expo_ray")

# Batches that an actor has been given, so that it never waits for the driver.
_BATCHES_AHEAD = 2
# Deaths that one batch outlives; a text that kills every actor must not be tried for ever.
MAX_DEATHS = 5
_DEATHS_TOGETHER = 2
_STALL_WARNING_S = 120.0


class RewardActor:
    """A reward model in a process of its own. Its methods may be called again at any time."""

    def __init__(self, model: Classifier | RewardFunction, dtype: str, gpu_share: float) -> None:
        self._model, self._dtype, self._gpu_share = model, dtype, gpu_share
        self._score: Any = None
        # Nothing here may ask the terminal that the job was started from.
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)

    def load(self, probe: Sequence[Sequence[int]], compares: bool = False) -> str:
        """Get ready to score; returns what computes.

        Args:
            probe: texts on which a model must agree with its definition.
            compares: whether to load both back ends of a model for that.

        Raises:
            ExpoError: if it cannot be loaded, or they do not agree.
        """
        model = self._model
        if isinstance(model, RewardFunction):
            score = function_scorer(model)
            self._score = lambda inputs: [score(one) for one in inputs]
            return model.uri
        found = inspect_reward_model(model.spec)
        if not isinstance(found, Classifier) or found.identity != model.identity:
            raise InputChanged(
                f"{model.uri}: its files are no longer those that were looked at when the job began; run it again"
            )
        folder = download_model(model.uri)
        backend = load_backend(
            model, folder, self._dtype, gpu_share=self._gpu_share, probe=probe, compares=compares
        )
        self._score = lambda inputs: [
            checked_reward(one, score, model.uri)
            for one, score in zip(inputs, backend.score([one.ids for one in inputs]), strict=True)
        ]
        return backend.name

    def score(self, inputs: Sequence[RewardInput]) -> list[Reward | ScoreFailure]:
        """The scores of some inputs, in their order."""
        if self._score is None:
            self.load(())
        scored: list[Reward | ScoreFailure] = self._score(inputs)
        return scored


@dataclass(eq=False)
class _Slot:
    """One actor.

    Attributes:
        loaded: becomes ready when the actor has.
        checks: whether it compares the back ends first.
        batches: how many it has been given and not returned.
    """

    actor: Any
    loaded: ray.ObjectRef[Any]
    checks: bool
    ready: bool = False
    batches: int = 0


@dataclass
class _Batch:
    inputs: Sequence[RewardInput]
    deaths: int = 0

    def split(self) -> list[_Batch]:
        """The batch itself; once actors have died over it twice, each response alone, so that the last error names the one."""
        if self.deaths < _DEATHS_TOGETHER or len(self.inputs) == 1:
            return [self]
        return [_Batch([asked], self.deaths) for asked in self.inputs]


class Crew:
    """The actors of one reward model, from the first start to the end.

    One that dies, alone or with its node, is replaced, and what it had not returned is given to another.

    Args:
        spec: says how many there are, and what each takes.
        gpu_share: GPUs of each.
        probe: texts on which the first actor answers for all that the back ends agree.
    """

    def __init__(
        self,
        spec: RewardModel,
        model: Classifier | RewardFunction,
        dtype: str,
        gpu_share: float,
        probe: Sequence[Sequence[int]],
    ) -> None:
        self._spec, self._model, self._dtype = spec, model, dtype
        self._gpu_share, self._probe = gpu_share, probe
        self._agreed = False
        self._died_loading = 0
        self._slots = [self._start(checks=number == 0) for number in range(spec.replicas)]

    def work_off(self, batches: Iterable[Sequence[RewardInput]]) -> Iterator[Sequence[Reward | ScoreFailure]]:
        """The scores of each batch, as they come.

        Raises:
            ExpoError: if the model cannot score at all.
        """
        queue = deque(map(_Batch, batches))
        under_way: dict[ray.ObjectRef[Any], tuple[_Slot, _Batch]] = {}
        try:
            while queue or under_way:
                self._submit(queue, under_way)
                loading = {slot.loaded: slot for slot in self._slots if not slot.ready}
                done, _ = ray.wait([*under_way, *loading], timeout=_STALL_WARNING_S)
                for ref in done:
                    if ref in loading:
                        self._take_in(loading[ref])
                        continue
                    slot, batch = under_way.pop(ref)
                    slot.batches -= 1
                    try:
                        yield ray.get(ref)
                    except RayError as error:
                        self._survive(error, batch)
                        self._replace(slot, error)
                        queue.extendleft(reversed(batch.split()))
                if not done:
                    log.warning(
                        "%s: nothing has come back for %d s; %d batch(es) are under way, %d of %d actors are ready",
                        self._spec.name, _STALL_WARNING_S, len(under_way), len(self._slots) - len(loading), len(self._slots),
                    )  # fmt: skip
        finally:
            for ref, (slot, _) in under_way.items():
                ray.cancel(ref)
                slot.batches -= 1

    def close(self) -> None:
        """End the actors."""
        for slot in self._slots:
            ray.kill(slot.actor)

    def _start(self, *, checks: bool) -> _Slot:
        options: dict[str, Any] = {
            "num_cpus": self._spec.num_cpus,
            "num_gpus": self._gpu_share,
            "scheduling_strategy": "SPREAD",
        }
        actor: Any = ray.remote(**options)(RewardActor).remote(self._model, self._dtype, self._gpu_share)
        return _Slot(actor, actor.load.remote(self._probe, checks), checks)

    def _submit(
        self, queue: deque[_Batch], under_way: dict[ray.ObjectRef[Any], tuple[_Slot, _Batch]]
    ) -> None:
        """Keep ready actors busy; none of them before the back ends are known to agree."""
        for slot in self._slots if self._agreed else ():
            while slot.ready and queue and slot.batches < _BATCHES_AHEAD:
                batch = queue.popleft()
                under_way[slot.actor.score.remote(batch.inputs)] = (slot, batch)
                slot.batches += 1

    def _take_in(self, slot: _Slot) -> None:
        """An actor has loaded its model, or has not."""
        try:
            name = ray.get(slot.loaded)
        except RayError as error:
            self._died_loading += 1
            if self._died_loading > MAX_DEATHS:
                raise RewardError(
                    f"{self._spec.name}: {self._died_loading} actors died while they loaded it ({_death(error)}); "
                    f"{self._remedy(error)}"
                ) from error
            self._replace(slot, error)
        else:
            slot.ready, self._died_loading = True, 0
            if slot.checks:
                self._agreed = True
                log.info("%s: scored by %s", self._spec.name, name)

    def _survive(self, error: RayError, batch: _Batch) -> None:
        """Count a death over a batch; too many are raised."""
        batch.deaths += 1
        if batch.deaths > MAX_DEATHS and not isinstance(error, RayTaskError):
            first = batch.inputs[0]
            raise RewardError(
                f"{self._spec.name}: {batch.deaths} actors died over the response to prompt {first.prompt_id}, sample "
                f"{first.sample} ({_death(error)}); {self._remedy(error)}"
            ) from error

    def _remedy(self, error: RayError) -> str:
        memory = "give the actors more memory, or set fewer `replicas`"
        if isinstance(self._model, RewardFunction) and "memory" not in _death(error):
            return f"look for what ends the process in {self._model.uri}: `os._exit`, a signal, a crash of compiled code; else {memory}"
        return memory

    def _replace(self, slot: _Slot, error: RayError) -> None:
        """Put a new actor in the place of a dead one; an error of the model itself is raised."""
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, ExpoError):
                raise error.cause
            log.error("%s failed", self._spec.name, exc_info=error)
            raise RewardError(
                f"{self._spec.name}: {type(error.cause).__name__}: {error.cause}; see the traceback above, and try "
                "`backend: transformers`"
            ) from error
        if isinstance(error, ActorUnschedulableError | RuntimeEnvSetupError):
            raise error
        if slot in self._slots:  # else its other batch has seen to it
            log.warning("%s: an actor died (%s); another takes over", self._spec.name, type(error).__name__)
            ray.kill(slot.actor)
            self._slots[self._slots.index(slot)] = self._start(checks=slot.checks and not slot.ready)


def _death(error: RayError) -> str:
    """How Ray says that an actor died, in a few words."""
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError) or "NODE_OUT_OF_MEMORY" in text:
        return "the node was out of memory"
    # What follows is a list of all that may have been the reason.
    detail = text.partition("Worker exit detail: ")[2].partition(". ")[0]
    return shown(detail or type(error).__name__)

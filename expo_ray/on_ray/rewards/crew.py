"""The actors of one reward model: which of them are ready, which batches each has, and which have to be replaced."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from ray.util.scheduling_strategies import SchedulingStrategyT

from expo_ray.errors import ExpoError, InputChanged, RewardError
from expo_ray.evaluation.records import Reward
from expo_ray.evaluation.rewards.reward_function import RewardFunction, function_scorer
from expo_ray.evaluation.rewards.reward_inputs import RewardInput, ScoreFailure
from expo_ray.evaluation.rewards.reward_model import (
    Classifier,
    inspect_reward_model,
)
from expo_ray.interrupt import raise_if_interrupted
from expo_ray.on_ray.capacity import LOOK_S
from expo_ray.on_ray.gpus import starting_alone
from expo_ray.on_ray.rewards.backends import load_backend
from expo_ray.on_ray.rewards.memory import ActorNeed
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
    """A reward model in its own process. Its methods may be called again at any time."""

    def __init__(self, model: Classifier | RewardFunction, dtype: str, num_gpus: float) -> None:
        self._model, self._dtype, self._num_gpus = model, dtype, num_gpus
        self._score: Any = None
        # Nothing here may ask the terminal that the job was started from.
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)

    def load(self, probe: Sequence[Sequence[int]], compares: bool = False) -> str:
        """Load the model; returns the name of the back end that computes.

        Args:
            probe: texts on which a model must agree with its definition.
            compares: whether to load both back ends of a model for that.

        Raises:
            ExpoError: if it cannot be loaded, or they do not agree.
        """
        model = self._model
        if isinstance(model, RewardFunction):
            score = function_scorer(model)
            self._score = lambda inputs: [score(asked) for asked in inputs]
            return model.uri
        now = inspect_reward_model(model.spec)
        if not isinstance(now, Classifier) or now.identity != model.identity:
            raise InputChanged(
                f"{model.uri}: its files are no longer those that were looked at when the job began; run it again"
            )
        folder = download_model(model.uri)
        with starting_alone(0 < self._num_gpus < 1):
            backend = load_backend(
                model, folder, self._dtype, num_gpus=self._num_gpus, probe=probe, compares=compares
            )
        self._score = lambda inputs: [
            asked.scored(score, model.uri)
            for asked, score in zip(inputs, backend.score([asked.ids for asked in inputs]), strict=True)
        ]
        return backend.name

    def score(self, inputs: Sequence[RewardInput]) -> list[Reward | ScoreFailure]:
        """Score some inputs, in their order."""
        if self._score is None:
            self.load(())
        scored: list[Reward | ScoreFailure] = self._score(inputs)
        return scored


@dataclass(eq=False)
class _Slot:
    """An actor and what it has been given.

    Attributes:
        loaded: becomes ready when the actor has.
        checks: whether it compares the back ends first.
        given: batches that it has not returned, the one that it works on first.
        killer: what it worked on when it died.
    """

    actor: Any
    loaded: ray.ObjectRef[Any]
    checks: bool
    ready: bool = False
    given: list[_Batch] = field(default_factory=list)
    killer: _Batch | None = None


@dataclass(eq=False)
class _Batch:
    inputs: Sequence[RewardInput]
    deaths: int = 0

    def split(self) -> list[_Batch]:
        """Return the batch itself, or each response alone once actors have died over it twice, so that the last error names it."""
        if self.deaths < _DEATHS_TOGETHER or len(self.inputs) == 1:
            return [self]
        return [_Batch([asked], self.deaths) for asked in self.inputs]


class Crew:
    """The actors of one reward model, from the first start to the end.

    The first actor of a model compares the back ends; the others start once these agree, all at once. So nothing is loaded in
    vain where they do not, and no reference takes memory beside another actor.

    An actor that dies, alone or with its node, is replaced, and the batches it had not returned are given to another.

    Args:
        need: the model, and what each actor takes.
        probe: texts on which the first actor answers for all that the back ends agree.
        strategies: how Ray is to schedule each actor.

    Attributes:
        size: number of actors.
    """

    def __init__(
        self, need: ActorNeed, probe: Sequence[Sequence[int]], strategies: Sequence[SchedulingStrategyT]
    ) -> None:
        self._strategies, self.size = strategies, len(strategies)
        self._need, self._probe = need, probe
        self._spec, self._model = need.checked.spec, need.checked.model
        self._agreed = False
        self._died_loading = 0
        self._changed = threading.Condition(threading.RLock())
        self._callers = 0
        self._slots = [self._start(0, checks=True)]
        if isinstance(self._model, RewardFunction):
            self._start_others()

    def work_off(self, batches: Iterable[Sequence[RewardInput]]) -> Iterator[Sequence[Reward | ScoreFailure]]:
        """Score all batches; yields the scores of each as it returns. Threads that do so at the same time share the actors evenly.

        Raises:
            ExpoError: if the model cannot score at all.
        """
        queue = deque(map(_Batch, batches))
        under_way: dict[ray.ObjectRef[Any], tuple[_Slot, _Batch]] = {}
        with self._changed:
            self._callers += 1
        try:
            while queue or under_way:
                for ref in self._wait(queue, under_way):
                    slot, batch = under_way.pop(ref)
                    try:
                        scores = ray.get(ref)
                    except RayError as error:
                        with self._taken_back(slot, batch):
                            self._count_death(error, slot, batch)
                            self._replace(slot, error)
                        queue.extendleft(reversed(batch.split()))
                    else:
                        with self._taken_back(slot, batch):
                            pass
                        yield scores
        finally:
            for ref, (slot, batch) in under_way.items():
                ray.cancel(ref)
                with self._taken_back(slot, batch):
                    pass
            with self._changed:
                self._callers -= 1

    def _wait(
        self, queue: deque[_Batch], under_way: dict[ray.ObjectRef[Any], tuple[_Slot, _Batch]]
    ) -> list[ray.ObjectRef[Any]]:
        """Give actors something to do, and wait until a batch is back, an actor is ready, or others leave room; returns what is back."""
        with self._changed:
            self._submit(queue, under_way)
            loading = {slot.loaded: slot for slot in self._slots if not slot.ready}
            starved = not under_way and any(
                slot.ready for slot in self._slots
            )  # all of them are busy for others
            if starved:
                self._changed.wait(1.0)
        if starved:
            raise_if_interrupted()
            done: Sequence[ray.ObjectRef[Any]] = ray.wait([*loading], timeout=0)[0] if loading else ()
        else:
            done = _wait_for_any([*under_way, *loading])
            if not done:
                log.warning(
                    "%s: nothing has come back for %d s; %d batch(es) are under way, %d of %d actors are ready",
                    self._spec.name, _STALL_WARNING_S, len(under_way), len(self._slots) - len(loading), self.size,
                )  # fmt: skip
        for ref in done:
            if ref in loading:
                with self._changed:
                    self._finish_loading(loading[ref])
                    self._changed.notify_all()
        return [ref for ref in done if ref in under_way]

    @contextmanager
    def _taken_back(self, slot: _Slot, batch: _Batch) -> Iterator[None]:
        """Hold the lock; then the actor has the batch no more, and others may have its place."""
        with self._changed:
            try:
                yield
            finally:
                slot.given.remove(batch)
                self._changed.notify_all()

    def close(self) -> None:
        """End the actors."""
        for slot in self._slots:
            ray.kill(slot.actor)

    def _start_others(self) -> None:
        while len(self._slots) < self.size:
            self._slots.append(self._start(len(self._slots), checks=False))

    def _start(self, number: int, *, checks: bool) -> _Slot:
        options: dict[str, Any] = {
            "num_cpus": self._spec.num_cpus,
            "num_gpus": self._need.num_gpus,
            "scheduling_strategy": self._strategies[number],
        }
        if reserved := self._need.reserved_bytes:
            options["memory"] = reserved
        actor: Any = ray.remote(**options)(RewardActor).remote(
            self._model, self._need.checked.dtype, self._need.num_gpus
        )
        return _Slot(actor, actor.load.remote(self._probe, checks), checks)

    def _submit(
        self, queue: deque[_Batch], under_way: dict[ray.ObjectRef[Any], tuple[_Slot, _Batch]]
    ) -> None:
        """Keep ready actors busy, with no more than this caller's share; none of them before the back ends are known to agree."""
        ready = [slot for slot in self._slots if slot.ready] if self._agreed else []
        share = -(-_BATCHES_AHEAD * len(ready) // self._callers)
        for depth in range(_BATCHES_AHEAD):
            for slot in ready:
                if queue and len(slot.given) <= depth and len(under_way) < share:
                    batch = queue.popleft()
                    under_way[slot.actor.score.remote(batch.inputs)] = (slot, batch)
                    slot.given.append(batch)

    def _finish_loading(self, slot: _Slot) -> None:
        """Take note that an actor has loaded its model, or replace one that died of it, unless another thread has done so."""
        if slot.ready or slot not in self._slots:
            return
        try:
            name = ray.get(slot.loaded)
        except RayError as error:
            self._died_loading += 1
            if self._died_loading > MAX_DEATHS:
                raise RewardError(
                    f"{self._spec.name}: {self._died_loading} actors died while they loaded it ({_death_of(error)}); "
                    f"{self._remedy(error)}"
                ) from error
            self._replace(slot, error)
        else:
            slot.ready, self._died_loading = True, 0
            if slot.checks:
                self._agreed = True
                log.info("%s: scored by %s", self._spec.name, name)
                self._start_others()

    def _count_death(self, error: RayError, slot: _Slot, batch: _Batch) -> None:
        """Count a death over a batch, unless it only waited behind the one that the actor worked on.

        Raises:
            RewardError: after more than `MAX_DEATHS`, unless the error is the model's.
        """
        slot.killer = slot.killer or slot.given[0]
        batch.deaths += batch is slot.killer
        if batch.deaths > MAX_DEATHS and not isinstance(error, RayTaskError):
            first = batch.inputs[0]
            raise RewardError(
                f"{self._spec.name}: {batch.deaths} actors died over the response to prompt {first.prompt_id}, sample "
                f"{first.sample} ({_death_of(error)}); {self._remedy(error)}"
            ) from error

    def _remedy(self, error: RayError) -> str:
        memory = "give the actors more memory, or set fewer `replicas`"
        if isinstance(self._model, RewardFunction) and "memory" not in _death_of(error):
            return f"look for what ends the process in {self._model.uri}: `os._exit`, a signal, a crash of compiled code; else {memory}"
        return memory

    def _replace(self, slot: _Slot, error: RayError) -> None:
        """Start a new actor in the place of a dead one.

        Raises:
            ExpoError: the model's own error, which another actor would meet as well.
        """
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
            number = self._slots.index(slot)
            self._slots[number] = self._start(number, checks=slot.checks and not slot.ready)


def _wait_for_any(refs: Sequence[ray.ObjectRef[Any]]) -> Sequence[ray.ObjectRef[Any]]:
    """Wait until one of some results is there; none after `_STALL_WARNING_S`.

    Raises:
        KeyboardInterrupt: soon after a signal.
    """
    deadline = time.monotonic() + _STALL_WARNING_S
    while True:
        done, _ = ray.wait([*refs], timeout=LOOK_S)
        raise_if_interrupted()
        if done or time.monotonic() > deadline:
            return done


def _death_of(error: RayError) -> str:
    """Reason that Ray gives for the death of an actor, in a few words."""
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError) or "NODE_OUT_OF_MEMORY" in text:
        return "the node was out of memory"
    # What follows is a list of all that may have been the reason.
    detail = text.partition("Worker exit detail: ")[2].partition(". ")[0]
    return shown(detail or type(error).__name__)

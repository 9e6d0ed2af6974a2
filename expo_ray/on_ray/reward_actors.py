"""One reward model on a pool of Ray actors."""

from __future__ import annotations

import logging
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import ActorUnschedulableError, RayError, RayTaskError, RuntimeEnvSetupError

from expo_ray.config import RewardModel
from expo_ray.errors import ExpoError, InputChanged, RewardError
from expo_ray.evaluation.records import Response, Reward
from expo_ray.evaluation.reward_function import Failed, RewardFunction, checked, function_scorer
from expo_ray.evaluation.reward_inputs import (
    RewardInput,
    Tokenizer,
    check_tokenizer,
    function_inputs,
    model_inputs,
)
from expo_ray.evaluation.reward_model import Classifier, inspect_reward_model, reward_id
from expo_ray.on_ray.parents import published_folder
from expo_ray.on_ray.reward_models import PARITY_TEXTS, load_backend
from expo_ray.storage import open_store

log = logging.getLogger("expo_ray")

BATCH_ROWS = 64
# Batches that an actor has been given, so that it never waits for the driver.
_BATCHES_AHEAD = 2
# Deaths that one batch outlives; a text that kills every actor must not be tried for ever.
MAX_DEATHS = 5
_STALL_WARNING_S = 120.0
# What fp32 weights may take of the memory, as activations and caches need some, too.
_MEMORY_SHARE = 0.75


class RewardActor:
    """A reward model in a process of its own. Its methods may be called again at any time."""

    def __init__(self, model: Classifier | RewardFunction, dtype: str, gpu_share: float) -> None:
        self._model, self._dtype, self._gpu_share = model, dtype, gpu_share
        self._score: Any = None

    def load(self, probe: Sequence[Sequence[int]]) -> str:
        """Get ready to score; returns what computes.

        Args:
            probe: texts on which the two back ends of a model must agree; none for no such check.

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
        folder = published_folder(model.uri)
        backend = load_backend(model, folder, self._dtype, gpu_share=self._gpu_share, probe=probe)
        self._score = lambda inputs: [
            checked(one, score, model.uri)
            for one, score in zip(inputs, backend.score([one.ids for one in inputs]), strict=True)
        ]
        return backend.name

    def score(self, inputs: Sequence[RewardInput]) -> list[Reward | Failed]:
        """The scores of some inputs, in their order."""
        if self._score is None:
            self.load(())
        scored: list[Reward | Failed] = self._score(inputs)
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


class RewardPool:
    """A reward model, ready to score; see `expo_ray.evaluation.reward.Scorer`.

    Nothing is loaded before something is to be scored. Actors stay until the pool is closed; `score` is for one thread at a
    time. An actor that dies, alone or with its node, is replaced, and what it had not returned is given to another.

    Args:
        spec: the reward model as a job file has it.

    Raises:
        ExpoError: if it cannot score, as far as its headers, tokenizer and template tell.
    """

    def __init__(self, spec: RewardModel) -> None:
        self.spec = spec
        self.model = inspect_reward_model(spec)
        self.tokenizer: Tokenizer | None = None
        self._dtype: str = "" if spec.dtype == "auto" else spec.dtype
        self._slots: list[_Slot] = []
        self._probe: list[Sequence[int]] = []
        self._agreed = False
        self._died_loading = 0
        if isinstance(self.model, Classifier):
            self.tokenizer = _load_tokenizer(self.model)
            for note in check_tokenizer(self.tokenizer, self.model.uri):
                log.warning("note: %s", note)

    @property
    def dtype(self) -> str:
        """What it computes in; empty for a function. `auto` asks the cluster how much memory there is."""
        if not self._dtype and isinstance(self.model, Classifier):
            self._dtype = _choose_dtype(self.model, self._gpu_share())
        return self._dtype

    @property
    def id(self) -> str:
        """Digest of what decides the scores."""
        return reward_id(self.model, self.spec, self.dtype)

    def inputs(self, responses: Sequence[Response]) -> list[RewardInput]:
        if self.tokenizer is None or isinstance(self.model, RewardFunction):
            return function_inputs(responses)
        return model_inputs(
            responses,
            self.tokenizer,
            where=self.model.uri,
            max_tokens=self.model.max_tokens,
            truncate=self.spec.truncate,
        )

    def score(self, inputs: Sequence[RewardInput]) -> Iterator[Sequence[Reward | Failed]]:
        # The longest first: what does not fit into memory fails early, and no long batch is left to run alone at the end.
        ordered = sorted(inputs, key=lambda one: len(one.ids) or len(one.text), reverse=True)
        size = max(1, min(BATCH_ROWS, -(-len(ordered) // (2 * self.spec.replicas))))
        queue = deque(_Batch(ordered[first : first + size]) for first in range(0, len(ordered), size))
        if queue and not self._slots:
            self._start(_probe(ordered))
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
                        queue.appendleft(batch)
                if not done:
                    log.warning(
                        "%s: nothing has come back for %d s; %d batch(es) are under way, %d of %d actors are ready",
                        self.spec.name, _STALL_WARNING_S, len(under_way), len(self._slots) - len(loading), len(self._slots),
                    )  # fmt: skip
        finally:
            for ref, (slot, _) in under_way.items():
                ray.cancel(ref)
                slot.batches -= 1

    def close(self) -> None:
        """End the actors."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, probe: list[Sequence[int]]) -> None:
        """Start the actors; the first one answers for all that the back ends agree."""
        self._check_room()
        self._probe = probe
        self._slots = [self._slot(checks=number == 0) for number in range(self.spec.replicas)]

    def _slot(self, *, checks: bool) -> _Slot:
        gpu_share = self._gpu_share()
        options: dict[str, Any] = {
            "num_cpus": self.spec.num_cpus,
            "num_gpus": gpu_share,
            "scheduling_strategy": "SPREAD",
        }
        actor: Any = ray.remote(**options)(RewardActor).remote(self.model, self.dtype, gpu_share)
        return _Slot(actor, actor.load.remote(self._probe if checks else []), checks)

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
                    f"{self.spec.name}: {self._died_loading} actors died while they loaded it ({type(error).__name__}); give them more "
                    "memory, or set fewer `replicas`"
                ) from error
            self._replace(slot, error)
        else:
            slot.ready, self._died_loading = True, 0
            if slot.checks:
                self._agreed = True
                log.info("%s: scored by %s", self.spec.name, name)

    def _survive(self, error: RayError, batch: _Batch) -> None:
        """Count a death over a batch; too many are raised."""
        batch.deaths += 1
        if batch.deaths > MAX_DEATHS and not isinstance(error, RayTaskError):
            raise RewardError(
                f"{self.spec.name}: {batch.deaths} actors died over the same {len(batch.inputs)} responses, prompt "
                f"{batch.inputs[0].prompt_id} among them ({type(error).__name__}); give the actors more memory, or remove these responses"
            ) from error

    def _replace(self, slot: _Slot, error: RayError) -> None:
        """Put a new actor in the place of a dead one; an error of the model itself is raised."""
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, ExpoError):
                raise error.cause
            log.error("%s failed", self.spec.name, exc_info=error)
            raise RewardError(
                f"{self.spec.name}: {type(error.cause).__name__}: {error.cause}; see the traceback above, and try `backend: transformers`"
            ) from error
        if isinstance(error, ActorUnschedulableError | RuntimeEnvSetupError):
            raise error
        if slot in self._slots:  # else its other batch has seen to it
            log.warning("%s: an actor died (%s); another takes over", self.spec.name, type(error).__name__)
            ray.kill(slot.actor)
            self._slots[self._slots.index(slot)] = self._slot(checks=slot.checks and not slot.ready)

    def share(self, kind: str) -> float:
        """CPUs or GPUs that one actor takes."""
        return self._gpu_share() if kind == "GPU" else self.spec.num_cpus

    def _gpu_share(self) -> float:
        if self.spec.num_gpus is not None:
            return self.spec.num_gpus
        on_gpu = isinstance(self.model, Classifier) and ray.cluster_resources().get("GPU", 0) > 0
        return 1.0 if on_gpu else 0.0

    def _check_room(self) -> None:
        """Refuse what no node can run; an autoscaled cluster without nodes may still get some."""
        wanted = {"CPU": self.spec.num_cpus, "GPU": self._gpu_share()}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= many for name, many in wanted.items()) for node in nodes):
            return
        most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
        if any(most.values()):
            raise RewardError(
                f"{self.spec.name}: an actor wants {wanted['CPU']:g} CPU(s) and {wanted['GPU']:g} GPU(s), and no node has both "
                f"(the largest have {most['CPU']:g} and {most['GPU']:g}); lower `num_cpus` or `num_gpus`"
            )


def _load_tokenizer(model: Classifier) -> Tokenizer:
    """The tokenizer of a reward model, from its small files alone.

    Raises:
        RewardError: if there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(model.uri)
        if "://" in model.uri:
            folder, store = Path(temporary), open_store(model.uri)
            for key in model.side_files:
                (folder / key).parent.mkdir(parents=True, exist_ok=True)
                (folder / key).write_bytes(store.read(key))
        try:
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise RewardError(
                f"{model.uri}: its tokenizer cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}); save it with the "
                "model"
            ) from error
    return tokenizer


def _probe(ordered: Sequence[RewardInput]) -> list[Sequence[int]]:
    """Texts of all lengths."""
    many = min(PARITY_TEXTS, len(ordered))
    return [ordered[number * (len(ordered) - 1) // max(many - 1, 1)].ids for number in range(many)]


def _choose_dtype(model: Classifier, gpu_share: float) -> str:
    """fp32 where it fits, else what is stored, in 16 bits."""
    if gpu_share:
        room = ray.get(ray.remote(num_gpus=gpu_share)(_gpu_bytes).remote()) * min(gpu_share, 1)
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
    """Memory of the first GPU that the task was given."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)

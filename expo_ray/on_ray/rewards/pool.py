"""One reward model on a pool of Ray actors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from expo_ray.checkpoint.tokenizer import load_tokenizer, tokenizer_files
from expo_ray.config import RewardModel
from expo_ray.errors import ExpoError, RewardError
from expo_ray.evaluation.records import Response, Reward
from expo_ray.evaluation.rewards.reward_function import RewardFunction, ScoreFailure
from expo_ray.evaluation.rewards.reward_inputs import (
    RewardInput,
    Tokenizer,
    check_tokenizer,
    function_inputs,
    model_inputs,
)
from expo_ray.evaluation.rewards.reward_model import Classifier, inspect_reward_model, reward_id
from expo_ray.on_ray.rewards.actors import Crew
from expo_ray.on_ray.rewards.backends import PARITY_TEXTS
from expo_ray.on_ray.rewards.placement import check_room, choose_dtype, gpu_share
from expo_ray.storage import open_store
from expo_ray.text import shown

log = logging.getLogger("expo_ray")

BATCH_ROWS = 64


class RewardPool:
    """A reward model, ready to score; see `expo_ray.evaluation.rewards.score_missing.Scorer`.

    Nothing is loaded before something is to be scored. The actors (`Crew`) stay until the pool is closed; `score` is for one
    thread at a time.

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
        self._crew: Crew | None = None
        if isinstance(self.model, Classifier):
            self.tokenizer = _load_tokenizer(self.model)
            for note in check_tokenizer(self.tokenizer, self.model.uri):
                log.warning("note: %s", note)

    @property
    def dtype(self) -> str:
        """What it computes in; empty for a function. `auto` asks the cluster how much memory there is."""
        if not self._dtype and isinstance(self.model, Classifier):
            self._dtype = choose_dtype(self.model, gpu_share(self.spec, self.model))
        return self._dtype

    @property
    def id(self) -> str:
        """Digest of what decides the scores."""
        return reward_id(self.model, self.spec, self.dtype)

    def share(self, kind: str) -> float:
        """CPUs or GPUs that one actor takes."""
        return gpu_share(self.spec, self.model) if kind == "GPU" else self.spec.num_cpus

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

    def score(self, inputs: Sequence[RewardInput]) -> Iterator[Sequence[Reward | ScoreFailure]]:
        if not inputs:
            return
        # The longest first: what does not fit into memory fails early, and no long batch is left to run alone at the end.
        ordered = sorted(inputs, key=lambda one: len(one.ids) or len(one.text), reverse=True)
        size = max(1, min(BATCH_ROWS, -(-len(ordered) // (2 * self.spec.replicas))))
        if self._crew is None:
            num_gpus = gpu_share(self.spec, self.model)
            check_room(self.spec, num_gpus)
            self._crew = Crew(self.spec, self.model, self.dtype, num_gpus, _probe(ordered))
        yield from self._crew.work_off(
            ordered[first : first + size] for first in range(0, len(ordered), size)
        )

    def close(self) -> None:
        """End the actors."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _load_tokenizer(model: Classifier) -> Tokenizer:
    """The tokenizer of a reward model, from its small files alone.

    Raises:
        RewardError: if there is none that can be loaded.
    """
    store = open_store(model.uri)
    try:
        tokenizer: Tokenizer = load_tokenizer(tokenizer_files(store, map(store.stat, model.side_files)))
    except ExpoError:
        raise
    except Exception as error:
        raise RewardError(
            f"{model.uri}: its tokenizer cannot be loaded ({type(error).__name__}: {shown(error)}); save it with the model"
        ) from error
    return tokenizer


def _probe(ordered: Sequence[RewardInput]) -> list[Sequence[int]]:
    """Texts of all lengths."""
    many = min(PARITY_TEXTS, len(ordered))
    return [ordered[number * (len(ordered) - 1) // max(many - 1, 1)].ids for number in range(many)]

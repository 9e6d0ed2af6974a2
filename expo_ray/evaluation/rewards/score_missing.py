"""Score what has no score yet: the stored rewards are read, the missing ones made, and kept as they come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from expo_ray.evaluation.records import Response, Reward, scored_digest
from expo_ray.evaluation.rewards.reward_function import ScoreFailure
from expo_ray.evaluation.rewards.reward_inputs import RewardInput
from expo_ray.progress import Counters

# Scores kept in memory at most this long: what a killed driver has to do again.
_STORE_EVERY_S = 5.0


class Scorer(Protocol):
    """A reward model at work, such as a pool of actors."""

    def inputs(self, responses: Sequence[Response]) -> list[RewardInput]:
        """What the model reads of each response, before any model is loaded.

        Raises:
            Problems: with everything that cannot be scored.
        """

    def score(self, inputs: Sequence[RewardInput]) -> Iterator[Sequence[Reward | ScoreFailure]]:
        """The scores, some at a time, in any order, each exactly once.

        Raises:
            ExpoError: if the model cannot score at all.
        """


class NamedScorer(Scorer, Protocol):
    """A reward model of a job at work: its rewards are stored under its name and id."""

    @property
    def name(self) -> str:
        """The reward model's name in the job."""

    @property
    def id(self) -> str:
        """Digest of all that decides the scores."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What made the rewards, for people who look into the folder."""

    def close(self) -> None:
        """Release what was loaded; what is scored next loads it again."""


class RewardStore(Protocol):
    """Where the rewards of one model's responses by one reward model are kept: `RowStore`, or a file."""

    def read(self, wanted: Callable[[Reward], bool]) -> Mapping[Hashable, Reward]: ...

    def write(self, rows: Sequence[Reward]) -> None: ...


@dataclass
class ScoredResponses:
    """What came of scoring.

    Attributes:
        rewards: of all responses asked for that have one, by (prompt id, sample).
        failed: why the others have none; empty unless a function failed or a score was no number.
        made: how many of `rewards` were not stored before.
    """

    rewards: dict[Hashable, Reward] = field(default_factory=dict)
    failed: list[ScoreFailure] = field(default_factory=list)
    made: int = 0


@dataclass(frozen=True)
class UnscoredResponses:
    """What is to be scored for one model's responses.

    Attributes:
        stored: rewards of the responses that have one.
        inputs: the responses without.
        reward_store: where the rewards are, and will be.
    """

    stored: Mapping[Hashable, Reward]
    inputs: Sequence[RewardInput]
    reward_store: RewardStore


def find_unscored(
    responses: Sequence[Response], scorer: Scorer, reward_store: RewardStore
) -> UnscoredResponses:
    """Find out which responses have no reward yet.

    Raises:
        Problems: with every response that cannot be scored.
        StorageError: if the stored rewards cannot be read.
    """
    wanted = {response.key: response for response in responses}
    # A response may have been made anew under the same name since it was scored.
    current = {key: scored_digest(response.messages, response.text) for key, response in wanted.items()}
    stored = reward_store.read(lambda reward: reward.scored == current.get(reward.key))
    missing = [response for key, response in wanted.items() if key not in stored]
    return UnscoredResponses(stored, scorer.inputs(missing), reward_store)


def score_missing(todo: UnscoredResponses, scorer: Scorer, progress: Counters) -> ScoredResponses:
    """Score what is missing and store it as it comes.

    Args:
        progress: expects these inputs already.

    Raises:
        ExpoError: if the reward model cannot score at all; what was scored before is stored.
    """
    outcome = ScoredResponses(dict(todo.stored))
    unsaved: list[Reward] = []
    saved_at = time.monotonic()
    try:
        for batch in scorer.score(todo.inputs) if todo.inputs else ():
            for one in batch:
                if isinstance(one, ScoreFailure):
                    outcome.failed.append(one)
                else:
                    outcome.rewards[one.key] = one
                    unsaved.append(one)
                    outcome.made += 1
            progress.add(
                rows=len(batch), tokens=sum(one.num_tokens for one in batch if isinstance(one, Reward))
            )
            if time.monotonic() - saved_at > _STORE_EVERY_S:
                todo.reward_store.write(unsaved)
                unsaved, saved_at = [], time.monotonic()
    finally:
        todo.reward_store.write(unsaved)
    return outcome


def score_responses(
    responses: Sequence[Response],
    scorer: Scorer,
    reward_store: RewardStore,
    progress: Counters,
) -> ScoredResponses:
    """The rewards of some responses: stored ones are read, missing ones made and stored.

    Raises:
        Problems: with every response that cannot be scored; nothing has been scored then.
        ExpoError: if the reward model cannot score at all.
    """
    todo = find_unscored(responses, scorer, reward_store)
    progress.expect(rows=len(todo.inputs), kept=len(todo.stored))
    return score_missing(todo, scorer, progress)


@dataclass(frozen=True)
class RewardSummary:
    """One row of a table of rewards.

    Attributes:
        prompts: number of different prompts.
        mean: of the prompts' mean rewards over their samples.
        standard_error: of `mean`, over prompts; NaN for a single one.
        num_tokens: mean length of the responses.
        truncated: how many responses were scored from their beginning only.
    """

    prompts: int
    mean: float
    standard_error: float
    num_tokens: float
    truncated: int


def summarise_rewards(responses: Sequence[Response], rewards: Mapping[Hashable, Reward]) -> RewardSummary:
    """Mean reward and its standard error; the samples of a prompt count as one draw, as they are no independent ones."""
    by_prompt: dict[str, list[float]] = {}
    for one in responses:
        if found := rewards.get(one.key):
            by_prompt.setdefault(one.prompt_id, []).append(found.reward)
    means = [math.fsum(values) / len(values) for values in by_prompt.values()]
    count = len(means)
    mean = math.fsum(means) / count if count else math.nan
    spread = math.fsum((one - mean) ** 2 for one in means)
    return RewardSummary(
        prompts=count,
        mean=mean,
        standard_error=math.sqrt(spread / (count - 1) / count) if count > 1 else math.nan,
        num_tokens=math.fsum(one.num_tokens for one in responses) / len(responses) if responses else math.nan,
        truncated=sum(found.truncated for found in rewards.values()),
    )

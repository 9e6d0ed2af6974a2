"""Score the responses that have no reward yet, and store the rewards while they are made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from expo_ray.evaluation.records import Response, Reward, scored_digest
from expo_ray.evaluation.rewards.reward_inputs import RewardInput, ScoreFailure
from expo_ray.progress import Counters

# A killed driver loses the rewards of at most this many seconds.
_STORE_EVERY_S = 5.0


class Scorer(Protocol):
    """A reward model at work, such as a pool of actors."""

    def inputs(self, responses: Sequence[Response]) -> list[RewardInput]:
        """Make what the model reads of each response; no weights are loaded for it.

        Raises:
            Problems: with every response that cannot be scored.
        """

    def score(self, inputs: Sequence[RewardInput]) -> Iterator[Sequence[Reward | ScoreFailure]]:
        """Score inputs, and yield the rewards in batches: in any order, each exactly once.

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
        """Description of what made the rewards, stored beside them."""

    def close(self) -> None:
        """Release what was loaded; what is scored next loads it again."""


class RewardStore(Protocol):
    """Rewards of one model's responses by one reward model: a `RowStore`, or a `RewardFile`."""

    def read(self, wanted: Callable[[Reward], bool]) -> Mapping[Hashable, Reward]: ...

    def write(self, rows: Sequence[Reward]) -> None: ...


@dataclass
class ScoredResponses:
    """The rewards of some responses, and the failures.

    Attributes:
        rewards: by prompt id and sample, those stored before among them.
        failed: the responses without a reward, because a function failed or a score was not finite.
        num_new: number of `rewards` that were not stored before.
    """

    rewards: dict[Hashable, Reward] = field(default_factory=dict)
    failed: list[ScoreFailure] = field(default_factory=list)
    num_new: int = 0


@dataclass(frozen=True)
class UnscoredResponses:
    """The responses of one model that have no reward yet.

    Attributes:
        stored: rewards of the model's other responses.
        inputs: the responses to score.
        reward_store: receives their rewards.
    """

    stored: Mapping[Hashable, Reward]
    inputs: Sequence[RewardInput]
    reward_store: RewardStore


def find_unscored(
    responses: Sequence[Response], scorer: Scorer, reward_store: RewardStore
) -> UnscoredResponses:
    """Read the stored rewards, and find the responses that have none.

    Raises:
        Problems: with every response that cannot be scored.
        StorageError: if the stored rewards cannot be read.
    """
    wanted = {response.key: response for response in responses}
    # By content, not by key: a response may have been replaced under the same key after it was scored.
    current = {key: scored_digest(response.messages, response.text) for key, response in wanted.items()}
    stored = reward_store.read(lambda reward: reward.scored == current.get(reward.key))
    missing = [response for key, response in wanted.items() if key not in stored]
    return UnscoredResponses(stored, scorer.inputs(missing), reward_store)


def score_missing(unscored: UnscoredResponses, scorer: Scorer, progress: Counters) -> ScoredResponses:
    """Score responses, and store their rewards while they are made.

    Args:
        progress: expects these inputs already.

    Raises:
        ExpoError: if the reward model cannot score at all; the rewards so far are stored.
    """
    scored = ScoredResponses(dict(unscored.stored))
    unsaved: list[Reward] = []
    saved_at = time.monotonic()
    try:
        for batch in scorer.score(unscored.inputs) if unscored.inputs else ():
            rewards = [reward for reward in batch if isinstance(reward, Reward)]
            scored.rewards |= {reward.key: reward for reward in rewards}
            scored.failed += [failure for failure in batch if isinstance(failure, ScoreFailure)]
            scored.num_new += len(rewards)
            unsaved += rewards
            progress.add(rows=len(batch), tokens=sum(reward.num_tokens for reward in rewards))
            if time.monotonic() - saved_at > _STORE_EVERY_S:
                unscored.reward_store.write(unsaved)
                unsaved, saved_at = [], time.monotonic()
    finally:
        unscored.reward_store.write(unsaved)
    return scored


def score_responses(
    responses: Sequence[Response],
    scorer: Scorer,
    reward_store: RewardStore,
    progress: Counters,
) -> ScoredResponses:
    """Score the responses that have no reward in `reward_store`, store the rewards, and return all of them.

    Raises:
        Problems: with every response that cannot be scored, before any is.
        ExpoError: if the reward model cannot score at all.
    """
    unscored = find_unscored(responses, scorer, reward_store)
    progress.expect(rows=len(unscored.inputs), kept=len(unscored.stored))
    return score_missing(unscored, scorer, progress)


@dataclass(frozen=True)
class RewardSummary:
    """The mean reward of one model by one reward model, as a row of a table shows it.

    Attributes:
        prompts: number of different prompts.
        mean: of the prompts' mean rewards over their samples.
        standard_error: of `mean`, over prompts; NaN for a single one.
        num_tokens: mean length of the responses.
        truncated: number of responses of which only the beginning was scored.
    """

    prompts: int
    mean: float
    standard_error: float
    num_tokens: float
    truncated: int


def summarise_rewards(responses: Sequence[Response], rewards: Mapping[Hashable, Reward]) -> RewardSummary:
    """Mean reward and its standard error. The samples of a prompt are averaged first, because they are not independent."""
    by_prompt: dict[str, list[float]] = {}
    for response in responses:
        if reward := rewards.get(response.key):
            by_prompt.setdefault(response.prompt_id, []).append(reward.reward)
    means = [math.fsum(values) / len(values) for values in by_prompt.values()]
    count = len(means)
    mean = math.fsum(means) / count if count else math.nan
    squares = math.fsum((value - mean) ** 2 for value in means)
    lengths = math.fsum(response.num_tokens for response in responses)
    return RewardSummary(
        prompts=count,
        mean=mean,
        standard_error=math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan,
        num_tokens=lengths / len(responses) if responses else math.nan,
        truncated=sum(reward.truncated for reward in rewards.values()),
    )

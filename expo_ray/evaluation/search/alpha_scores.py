"""Responses and rewards of one alpha as numbers, a row for each prompt."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np

from expo_ray.config import check_alpha, format_alpha
from expo_ray.errors import ExpoError
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Response, Reward
from expo_ray.evaluation.search.response_measures import RESPONSE_MEASURES
from expo_ray.evaluation.statistics import Array, Clusters, gain, length_controlled_gain, mean_of, win_rate
from expo_ray.extrapolation.step import Step
from expo_ray.report.results import HalfName, Measurement
from expo_ray.text import first_few

# Prompt id and sample, or the wider type that `RowStore.read` gives.
Key = TypeVar("Key", bound=Hashable)
# Log-probabilities of the tokens of dpo's own responses, by (prompt id, sample).
LogProbabilities = Mapping[tuple[str, int], Sequence[float]]


class EvaluationError(ExpoError):
    """Rows of responses and rewards that do not belong together."""


@dataclass(frozen=True, eq=False)
class AlphaScores:
    """Scores of one alpha on some prompts. All arrays have a row for each prompt, and are means over its samples.

    Attributes:
        alpha: as served.
        prompt_ids: in the order of the prompt set.
        rewards: by reward model; the first one chooses alpha, the others have their say by `roles`.
        lengths: generated tokens.
        measures: by name in `RESPONSE_MEASURES`, for the guardrails.
        divergence: KL(dpo || alpha) in nats, the sum over the tokens of dpo's response, and their number: (prompts, 2);
            None where no log-probabilities were collected.
        samples: responses to each prompt.
        clusters: (prompts,), labels of prompts that hang together; None where each stands alone.
    """

    alpha: float
    prompt_ids: tuple[str, ...]
    rewards: Mapping[str, Array]
    lengths: Array
    measures: Mapping[str, Array]
    divergence: Array | None = None
    samples: int = 1
    clusters: Clusters | None = None

    @cached_property
    def row_of(self) -> Mapping[str, int]:
        """Row of each prompt id."""
        return {prompt_id: row for row, prompt_id in enumerate(self.prompt_ids)}

    def on(self, prompt_ids: Sequence[str]) -> AlphaScores:
        """The same on these prompts only, in their order."""
        if tuple(prompt_ids) == self.prompt_ids:
            return self
        rows = [self.row_of[prompt_id] for prompt_id in prompt_ids]
        return replace(
            self,
            prompt_ids=tuple(prompt_ids),
            rewards={model: values[rows] for model, values in self.rewards.items()},
            lengths=self.lengths[rows],
            measures={name: values[rows] for name, values in self.measures.items()},
            divergence=None if self.divergence is None else self.divergence[rows],
            clusters=None if self.clusters is None else self.clusters[rows],
        )

    def clustered(self, labels: Mapping[str, int]) -> AlphaScores:
        """The same with the cluster of each prompt, where some share one."""
        clusters = np.array([labels.get(prompt_id, -1 - row) for prompt_id, row in self.row_of.items()])
        several = 1 < len(np.unique(clusters)) < len(clusters)
        return replace(self, clusters=clusters if several else None)

    def joined(self, other: AlphaScores) -> AlphaScores:
        """The same with the rows of prompts that only `other` has, behind these."""
        new = other.on([prompt_id for prompt_id in other.prompt_ids if prompt_id not in self.row_of])
        both = self.divergence is not None and new.divergence is not None
        return replace(
            self,
            prompt_ids=self.prompt_ids + new.prompt_ids,
            rewards={
                model: np.concatenate([values, new.rewards[model]]) for model, values in self.rewards.items()
            },
            lengths=np.concatenate([self.lengths, new.lengths]),
            measures={
                name: np.concatenate([values, new.measures[name]]) for name, values in self.measures.items()
            },
            divergence=np.concatenate([self.divergence, new.divergence]) if both else None,
        )

    @property
    def chooser(self) -> str:
        """Name of the reward model that chooses alpha: the first one."""
        return next(iter(self.rewards))


@dataclass(frozen=True, eq=False)
class AnsweredAgain:
    """Responses of dpo to questions that it had answered before, with the same seeds.

    Attributes:
        before, again: the scores, on the same prompts.
        responses: number of them.
        same: those whose text is the same as before.
    """

    before: AlphaScores
    again: AlphaScores
    responses: int
    same: int


class Evaluator(Protocol):
    """Evaluates steps of one pair; safe to call from several threads."""

    @property
    def num_responses(self) -> int:
        """Responses to all steps so far."""

    def expect(self, steps: Sequence[Step]) -> None:
        """Learn which steps will probably be evaluated, in this order, so that the weights of one are made while another answers."""

    def evaluate(self, step: Step, prompts: PromptSet) -> AlphaScores:
        """Ask for and score the responses of a step to `prompts`; those that are stored are not made again.

        Raises:
            ExpoError: if a prompt stays unanswered, or a response without a reward.
        """

    def ask_dpo_again(self, prompts: PromptSet) -> AnsweredAgain:
        """Ask and score dpo once more on prompts that it has answered; the new responses are stored apart, and not made twice either.

        Raises:
            ExpoError: as `evaluate`.
        """

    def responses(self, step: Step, prompt_ids: Collection[str]) -> Mapping[str, Response]:
        """Read back the first response of a step to those of some prompts that it was evaluated on, by prompt id.

        Raises:
            StorageError: if they cannot be read.
        """


def alpha_scores(
    alpha: float,
    prompt_ids: Sequence[str],
    responses: Mapping[Key, Response],
    rewards: Mapping[str, Mapping[Key, Reward]],
    *,
    special_tokens: Sequence[str] = (),
    logprobs: tuple[LogProbabilities, LogProbabilities] | None = None,
) -> AlphaScores:
    """Gather the stored rows of one alpha.

    Args:
        alpha: that was served.
        prompt_ids: the prompts to take, in the order of the prompt set. Rows of others are passed over.
        responses: by key, as `RowStore.read` gives them.
        rewards: by reward model, the choosing one first; each by key.
        special_tokens: strings that no response should contain, such as those of the tokenizer.
        logprobs: of dpo's own responses, first by dpo, then by this alpha, token for token.

    Raises:
        EvaluationError: if a prompt has no response, another number of samples than the others, a response without a reward, or a
            reward that is not finite.
    """
    check_alpha(alpha)
    scored = {model: {row.key: row.reward for row in by_key.values()} for model, by_key in rewards.items()}
    by_prompt: dict[str, list[Response]] = {prompt_id: [] for prompt_id in prompt_ids}
    for response in responses.values():
        if response.prompt_id in by_prompt:
            by_prompt[response.prompt_id].append(response)
    samples = max((len(rows) for rows in by_prompt.values()), default=0)
    _check(alpha, by_prompt, scored, samples)

    def per_prompt(values: Mapping[tuple[str, int], float]) -> Array:
        return np.array([np.mean([values[row.key] for row in rows]) for rows in by_prompt.values()])

    taken = [row for rows in by_prompt.values() for row in rows]
    tokens = [token for token in special_tokens if token]
    return AlphaScores(
        alpha=alpha,
        prompt_ids=tuple(prompt_ids),
        rewards={model: per_prompt(values) for model, values in scored.items()},
        lengths=per_prompt({row.key: row.num_tokens for row in taken}),
        measures={
            name: per_prompt({row.key: response.measure(row, tokens) for row in taken})
            for name, response in RESPONSE_MEASURES.items()
        },
        divergence=None if logprobs is None else _divergence(alpha, by_prompt, *logprobs),
        samples=samples,
    )


def measurements(
    half: HalfName, scores: AlphaScores, dpo: AlphaScores, confidence: float
) -> Iterator[Measurement]:
    """Compare an alpha with dpo on the same prompts, by each reward model."""
    clusters = dpo.clusters
    for model, rewards in scores.rewards.items():
        of_dpo, lengths = dpo.rewards[model], (scores.lengths, dpo.lengths)
        yield Measurement(
            alpha=scores.alpha,
            half=half,
            reward_model=model,
            prompts=len(scores.prompt_ids),
            reward=mean_of(rewards, confidence, clusters=clusters),
            gain=gain(rewards, of_dpo, confidence, clusters=clusters),
            controlled_gain=length_controlled_gain(rewards, of_dpo, *lengths, confidence, clusters=clusters),
            win_rate=win_rate(rewards, of_dpo, confidence, clusters=clusters).mean,
        )


def _check(
    alpha: float,
    by_prompt: Mapping[str, Sequence[Response]],
    rewards: Mapping[str, Mapping[tuple[str, int], float]],
    samples: int,
) -> None:
    name = f"alpha {format_alpha(alpha)}"
    uneven = [prompt for prompt, rows in by_prompt.items() if len(rows) != samples or not rows]
    if uneven or not by_prompt:
        raise EvaluationError(
            f"{name}: {len(uneven)} of {len(by_prompt)} prompts do not have {max(samples, 1)} response(s) each ({first_few(uneven)}); run "
            "`respond` again, it asks for what is missing"
        )
    if not rewards:
        raise EvaluationError(f"{name}: there are no rewards; list a reward model under `rewards`")
    for model, scored in rewards.items():
        keys = [row.key for rows in by_prompt.values() for row in rows]
        missing = [f"{key[0]}/{key[1]}" for key in keys if key not in scored]
        if missing:
            raise EvaluationError(
                f"{name}: {model} has not scored {len(missing)} of {len(keys)} responses ({first_few(missing)}); run `reward` again, it "
                "scores what is missing"
            )
        wrong = [f"{key[0]}/{key[1]}" for key in keys if not np.isfinite(scored[key])]
        if wrong:
            raise EvaluationError(
                f"{name}: {model} gave {len(wrong)} reward(s) that are no finite number ({first_few(wrong)}), so their mean says "
                "nothing; fix the reward model and score them again"
            )


def _divergence(
    alpha: float,
    by_prompt: Mapping[str, Sequence[Response]],
    of_dpo: LogProbabilities,
    of_alpha: LogProbabilities,
) -> Array:
    rows = []
    for prompt in by_prompt:
        total, count = 0.0, 0
        for key in (key for key in of_dpo if key[0] == prompt):
            dpo, other = np.asarray(of_dpo[key]), np.asarray(of_alpha.get(key, ()))
            if dpo.shape != other.shape:
                raise EvaluationError(
                    f"alpha {format_alpha(alpha)}: prompt {prompt} has {len(other)} log-probabilities and dpo {len(dpo)}; collect "
                    "both on the same tokens of dpo's response"
                )
            total, count = total + float((dpo - other).sum()), count + len(dpo)
        rows.append((total, count))
    return np.array(rows, dtype=np.float64)

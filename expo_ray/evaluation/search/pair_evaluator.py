"""A pair behind an endpoint: the answers and rewards of any step, as numbers for the search."""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from expo_ray.checkpoint.tokenizer import read_special_tokens, tokenizer_files
from expo_ray.config import Sampling
from expo_ray.errors import EndpointError, Problems, RewardError
from expo_ray.evaluation.paths import ResponsesFolder, likelihoods_folder
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Response, Reward, response_from_row, reward_from_row
from expo_ray.evaluation.responses.ask_missing import ask_model
from expo_ray.evaluation.responses.endpoint import KEY_VARIABLE
from expo_ray.evaluation.responses.likelihoods import likelihood_from_row, measure_likelihoods
from expo_ray.evaluation.rewards.score_missing import NamedScorer, score_responses
from expo_ray.evaluation.row_store import RowStore
from expo_ray.evaluation.search.alpha_scores import (
    AlphaScores,
    AnsweredAgain,
    LogProbabilities,
    alpha_scores,
)
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import DPO, Step, stepped
from expo_ray.progress import Progress
from expo_ray.storage import Store, open_store
from expo_ray.text import shown

# Prompts on which KL divergence from dpo is measured: a few hundred tokens tell it well enough for a guardrail.
KL_PROMPTS = 32


@dataclass(frozen=True)
class SharedScorer:
    """A reward model that the pairs of a search share.

    Attributes:
        turn: entered while it scores, by several threads; makes room for it where others want the same.
    """

    scorer: NamedScorer
    turn: AbstractContextManager[Any] = field(default_factory=nullcontext)


class PairEvaluator:
    """Asks for the missing responses and rewards of a step; called from several threads, see `Evaluator`.

    Args:
        url: of the endpoint that serves the pair.
        search_id: of the search that evaluates; what it asks again is stored under it.
        scorers: the reward models of the job; the first one chooses alpha.
        slots: requests that keep the pair's engines busy.
        store: the job's output.
        key_variable: names the variable with the key of the endpoint.
        at_once: steps that may be answered at the same time: as many as the pair's engines hold.
        turn: entered while the engines are asked, by several threads; starts them where they have ended for a reward model.

    Texts are not kept: the job's output holds them, and a driver of many pairs could not.

    Attributes:
        num_responses: of all steps together.
        num_tokens: of all responses.
    """

    def __init__(
        self,
        plan: PairPlan,
        url: str,
        scorers: Sequence[SharedScorer],
        *,
        search_id: str,
        sampling: Sampling,
        store: Store,
        progress: Progress,
        slots: int,
        at_once: int,
        key_variable: str = KEY_VARIABLE,
        turn: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._turn = turn or nullcontext()
        self._key_variable = key_variable
        self._plan, self._url, self._scorers, self._sampling = plan, url, scorers, sampling
        self._store, self._progress, self._slots = store, progress, slots
        # More steps than engines hold would swap weights to and fro; scoring one while the next is answered costs nothing.
        self._answering, self._at_once = threading.Semaphore(at_once), at_once
        self._expected: Sequence[Step] = ()
        self._special_tokens = special_tokens(plan)
        self._search_id = search_id
        self._conditions: Mapping[str, Any] = {}
        self._asking_dpo = threading.Lock()
        self._origins: dict[Step, set[str]] = {}
        self._counted: dict[Step, dict[Hashable, int]] = {}

    @property
    def num_responses(self) -> int:
        return sum(map(len, self._counted.values()))

    @property
    def num_tokens(self) -> int:
        return sum(sum(tokens.values()) for tokens in self._counted.values())

    def expect(self, steps: Sequence[Step]) -> None:
        """Learn which steps will probably be evaluated, in this order; requests then name the next step of their engine."""
        self._expected = tuple(steps)

    def _next_name(self, step: Step) -> str:
        """Served name of the step that follows `step` on the same engine; empty if unknown."""
        if step not in self._expected:
            return ""
        following = self._expected[self._expected.index(step) + self._at_once :]
        return self._name(following[0]) if following else ""

    def evaluate(self, step: Step, prompts: PromptSet) -> AlphaScores:
        """Ask for and score the responses of a step to some prompts, as far as they are not stored.

        Raises:
            ExpoError: if a prompt stays unanswered, or a response without a reward.
        """
        with self._turn, self._answering:
            responses = self._responses(step, prompts)
            logprobs = None if step.alpha < 0 else self._logprobs(step, prompts)
        self._origins.setdefault(step, set()).update(response.origin for response in responses.values())
        self._counted.setdefault(step, {}).update(
            {key: response.num_tokens for key, response in responses.items()}
        )
        return self._score(step, prompts, responses, logprobs)

    def ask_dpo_again(self, prompts: PromptSet) -> AnsweredAgain:
        """Ask and score dpo once more on prompts that it has answered, apart from what was stored.

        Raises:
            ExpoError: if a prompt stays unanswered, or a response without a reward.
        """
        with self._turn:
            before = self._responses(DPO, prompts)
            responses = self._responses(DPO, prompts, again=self._search_id)
        self._counted.setdefault(DPO, {}).update(
            {("again", key): response.num_tokens for key, response in responses.items()}
        )
        same = sum(response.text == before[key].text for key, response in responses.items())
        return AnsweredAgain(
            self._score(DPO, prompts, before),
            self._score(DPO, prompts, responses, again=self._search_id),
            len(responses),
            same,
        )

    def _score(
        self,
        step: Step,
        prompts: PromptSet,
        responses: Mapping[Hashable, Response],
        logprobs: tuple[LogProbabilities, LogProbabilities] | None = None,
        *,
        again: str = "",
    ) -> AlphaScores:
        name = self._name(step)
        rewards = {
            shared.scorer.name: self._rewards(name, responses, shared, again=again)
            for shared in self._scorers
        }
        ids = [prompt.id for prompt in prompts.prompts]
        return alpha_scores(
            step.alpha, ids, responses, rewards, special_tokens=self._special_tokens, logprobs=logprobs
        )

    def responses(self, step: Step, prompt_ids: Collection[str]) -> dict[str, Response]:
        """Read back the first response of a step to each of some prompts, by prompt id.

        Raises:
            StorageError: if they cannot be read.
        """
        # Not all that is stored: another job may have asked more.
        wanted = {prompt_id for prompt_id in prompt_ids if (prompt_id, 0) in self._counted.get(step, {})}
        rows: list[Response] = []
        for origin in sorted(self._origins.get(step, ())):
            folder = ResponsesFolder.of(self._name(step), origin)
            row_store = RowStore(self._store, folder.responses, response_from_row)
            rows += row_store.read(lambda row: row.sample == 0 and row.prompt_id in wanted).values()
        return {row.prompt_id: row for row in rows}

    def _name(self, step: Step) -> str:
        return f"{self._plan.name}@{step}"

    def _responses(self, step: Step, prompts: PromptSet, *, again: str = "") -> dict[Hashable, Response]:
        answers = ask_model(
            self._url, self._name(step), [prompts], self._sampling, self._store, progress=self._progress, slots=self._slots,
            key_variable=self._key_variable, next_name=self._next_name(step), again=again,
        )  # fmt: skip
        if answers.problems:
            raise Problems(answers.problems)
        self._refuse_other_conditions(step, answers.conditions)
        return {response.key: response for response in answers.responses.values()}

    def _refuse_other_conditions(self, step: Step, conditions: Mapping[str, Any]) -> None:
        """Compare what decided these responses, beside the weights, with what decided those of the pair before: dpo's among them.

        Raises:
            EndpointError: if anything differs.
        """
        self._conditions = self._conditions or conditions
        changed = [
            f"{key} was {shown(before)} and is {shown(conditions[key])}"
            for key, before in self._conditions.items()
            if conditions[key] != before
        ]
        if changed:
            raise EndpointError(
                f"{self._name(step)}: the engine has changed since dpo was asked ({'; '.join(changed)}), and answers of different engines are not "
                "compared; run the job again, which asks dpo anew where its answers are of another engine"
            )

    def _logprobs(self, step: Step, prompts: PromptSet) -> tuple[LogProbabilities, LogProbabilities]:
        """Measure the log-probabilities of dpo's own responses to a few prompts, by dpo and by `step`."""
        few = prompts.first(KL_PROMPTS)
        with self._asking_dpo:  # several steps want the same ones at the same time
            answered = [response for response in self._responses(DPO, few).values() if response.text]
            by_dpo = self._likelihoods(DPO, answered)
        return by_dpo, by_dpo if step == DPO else self._likelihoods(step, answered)

    def _likelihoods(self, step: Step, responses: Sequence[Response]) -> LogProbabilities:
        name, weights = self._name(step), stepped(self._plan, step).plan_id(step.alpha)
        origin = responses[0].origin if responses else ""
        row_store = RowStore(self._store, likelihoods_folder(name, weights, origin), likelihood_from_row)
        return measure_likelihoods(
            self._url, name, responses, row_store, slots=self._slots, key_variable=self._key_variable,
            next_name=self._next_name(step),
        )  # fmt: skip

    def _rewards(
        self, name: str, responses: Mapping[Hashable, Response], shared: SharedScorer, *, again: str
    ) -> Mapping[Hashable, Reward]:
        """Score the responses that have no reward yet, kept apart by their origin as their folders are."""
        scorer, rewards = shared.scorer, dict[Hashable, Reward]()
        for origin in sorted({response.origin for response in responses.values()}):
            rows = [response for response in responses.values() if response.origin == origin]
            place = ResponsesFolder.of(name, origin)
            folder = (place.again(again) if again else place).rewards(scorer.name, scorer.id)
            with shared.turn:
                scored = score_responses(
                    rows, scorer, RowStore(self._store, folder, reward_from_row), self._progress.rewards
                )
            if scored.failed:
                first_failed = scored.failed[0]
                raise RewardError(
                    f"{name}: {scorer.name} gave no reward to {len(scored.failed)} of {len(rows)} responses, prompt "
                    f"{first_failed.prompt_id} among them: {first_failed.error}"
                )
            rewards |= scored.rewards
        return rewards


def special_tokens(plan: PairPlan) -> list[str]:
    """Read the texts of the tokens that the pair's tokenizer calls special; none where its files do not say."""
    parent = plan.engine_side_files.get("tokenizer.json")
    if parent is None or "tokenizer.json" not in parent.files:
        return []
    files = tokenizer_files(open_store(parent.uri), [parent.files["tokenizer.json"]])
    return [token.content for token in read_special_tokens(files)]

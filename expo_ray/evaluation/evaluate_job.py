"""The two steps of evaluating a job, once engines and reward models are at work: answer its prompts, score the answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from expo_ray.config import Sampling
from expo_ray.errors import Collected, ExpoError, JobError, StorageError
from expo_ray.evaluation.check_job import CheckedJob
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Response, reward_from_row
from expo_ray.evaluation.responses.ask_models import ResponsesByModel, ask_into_file, ask_job_models
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.response_file import ResponseFile
from expo_ray.evaluation.responses.stored_responses import StoredResponses, read_stored_responses
from expo_ray.evaluation.rewards.reward_file import RewardFile
from expo_ray.evaluation.rewards.score_missing import (
    NamedScorer,
    ScoredResponses,
    UnscoredResponses,
    find_unscored,
    score_missing,
)
from expo_ray.evaluation.row_store import RowStore
from expo_ray.progress import Progress
from expo_ray.status_file import StatusFile
from expo_ray.storage import Store, open_store


def respond(checked: CheckedJob, client: Client, status: StatusFile | None = None) -> ResponsesByModel:
    """Ask all models of a job, behind one endpoint, for the responses that its output lacks, and store them.

    A model that fails does not stop the others; it is named among the failures.
    """
    store = open_store(checked.job.output)
    with Progress("respond", status, rows="responses") as progress:
        try:
            responded = ask_job_models(checked.job, checked.sets, store, client, progress)
        except StorageError as error:  # what was answered before is stored
            responded = ResponsesByModel(failures=[str(error)])
        progress.finish(responded.failures)
    return responded


def respond_file(
    output: ResponseFile, name: str, prompts: PromptSet, sampling: Sampling, client: Client
) -> ResponsesByModel:
    """Ask one model for the responses that a file lacks; see `ask_into_file`. Failures are named, not raised."""
    with Progress("respond", rows="responses") as progress:
        try:
            responded = ask_into_file(output, name, prompts, sampling, client=client, progress=progress)
        except StorageError as error:
            responded = ResponsesByModel(failures=[str(error)])
        progress.finish(responded.failures)
    return responded


@dataclass(frozen=True)
class RewardTask:
    """The responses of one model, to be scored by one reward model.

    Attributes:
        model: name as served.
    """

    scorer: NamedScorer
    model: str
    responses: Sequence[Response]
    todo: UnscoredResponses


@dataclass
class Rewarded:
    """Rewards of several models by several reward models.

    Attributes:
        scored: what each reward model made of each model.
        failures: one text for each reason why rewards are missing.
    """

    scored: list[tuple[RewardTask, ScoredResponses]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def load_responses(checked: CheckedJob) -> list[StoredResponses]:
    """Read the stored responses of a job's models to its prompts.

    Raises:
        JobError: if there are none.
        StorageError: if they cannot be read.
    """
    store = open_store(checked.job.output)
    groups = read_stored_responses(store, checked.job, checked.sets)
    if not groups:
        raise JobError(
            f"{store.uri}: holds no responses to the job's prompts, drawn as it says; run `expo-ray respond` on the job first"
        )
    return groups


def reward(
    checked: CheckedJob,
    groups: Sequence[StoredResponses],
    scorers: Sequence[NamedScorer],
    status: StatusFile | None = None,
) -> Rewarded:
    """Score stored responses by all reward models, and store the rewards beside them.

    Raises:
        Problems: with every response that cannot be scored, before any model is loaded.
    """
    store = open_store(checked.job.output)
    problems, tasks = Collected(), []
    for scorer in scorers:
        for group in groups:
            with problems.catching():
                tasks.append(_plan_task(scorer, group, store))
    problems.raise_any()
    with Progress("reward", status, rows="responses") as progress:
        return _score_tasks(tasks, progress)


def reward_file(output: str, responses: Sequence[Response], name: str, scorer: NamedScorer) -> Rewarded:
    """Score responses into the file `output`.

    Args:
        name: of the model that answered.
    """
    file = RewardFile(output, [response.key for response in responses], scorer.about)
    todo = find_unscored(responses, scorer, file)
    with Progress("reward", rows="responses") as progress:
        return _score_tasks([RewardTask(scorer, name, responses, todo)], progress)


def _plan_task(scorer: NamedScorer, group: StoredResponses, store: Store) -> RewardTask:
    """Find out what is to be scored, and store what makes the rewards beside their folder."""
    names = scorer.name, scorer.id
    todo = find_unscored(
        group.responses, scorer, RowStore(store, group.folder.rewards(*names), reward_from_row)
    )
    store.put(group.folder.rewards_about(*names), (json.dumps(scorer.about, indent=1) + "\n").encode())
    return RewardTask(scorer, group.model, group.responses, todo)


def _score_tasks(tasks: Sequence[RewardTask], progress: Progress) -> Rewarded:
    """Score all tasks, one reward model after the other: each is released before the next one is loaded."""
    progress.expect(
        rows=sum(len(task.todo.inputs) for task in tasks), kept=sum(len(task.todo.stored) for task in tasks)
    )
    rewarded = Rewarded()
    for scorer in dict.fromkeys(task.scorer for task in tasks):
        with closing(scorer):
            for task in tasks:
                if task.scorer is not scorer:
                    continue
                try:
                    scored = score_missing(task.todo, scorer, progress)
                except ExpoError as error:
                    rewarded.failures.append(f"{task.model} by {scorer.name}: {error}")
                else:
                    rewarded.scored.append((task, scored))
                    rewarded.failures += _unscored(task, scored)
    progress.finish(rewarded.failures)
    return rewarded


def _unscored(task: RewardTask, scored: ScoredResponses) -> Iterable[str]:
    """Describe the responses without a reward: one text for each reason."""
    reasons: dict[str, list[str]] = {}
    for failed in scored.failed:
        reasons.setdefault(failed.error, []).append(failed.prompt_id)
    for reason, ids in reasons.items():
        yield (
            f"{task.model} by {task.scorer.name}: {len(ids)} response(s) have no reward, prompt {', '.join(ids[:5])}"
            f"{' and more' if len(ids) > 5 else ''}: {reason}"
        )

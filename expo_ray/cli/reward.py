"""`expo-ray reward`: a job's stored responses by all its reward models, or one file by one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from expo_ray.cli.flags import given_flags, with_flags
from expo_ray.config import Job, RewardModel, load_job
from expo_ray.errors import Attempts, ExpoError, JobError
from expo_ray.evaluation.prompts.load_prompts import load_prompts
from expo_ray.evaluation.records import Response, reward_from_row
from expo_ray.evaluation.responses.stored_responses import StoredResponses, read_stored_responses
from expo_ray.evaluation.rewards.reward_file import RewardFile, read_responses
from expo_ray.evaluation.rewards.score_missing import (
    ScoredResponses,
    UnscoredResponses,
    find_unscored,
    score_missing,
    summarise_rewards,
)
from expo_ray.evaluation.row_store import RowStore
from expo_ray.on_ray.cluster import cluster
from expo_ray.on_ray.rewards.pool import RewardPool
from expo_ray.progress import Progress
from expo_ray.storage import Store, open_output_file, open_store

FAILED = 1
_WITHOUT_JOB = ("responses", "reward_model", "backend", "allow_pickle", "truncate", "output")


@dataclass(frozen=True)
class Work:
    """The responses of one model, to be scored by one reward model."""

    pool: RewardPool
    model: str
    responses: Sequence[Response]
    todo: UnscoredResponses


def command(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status.

    Raises:
        ExpoError: for everything wrong with the input, before any model is loaded.
    """
    given = given_flags(arguments, _WITHOUT_JOB)
    if arguments.job and given:
        raise JobError(f"a job file and {', '.join(given)}; give one or the other")
    if arguments.job:
        return reward_job(load_job(arguments.job))
    if not (arguments.responses and arguments.reward_model and arguments.output):
        raise JobError("give a job file, or --responses, --reward-model and --output")
    spec = RewardModel(
        model=arguments.reward_model,
        backend=arguments.backend or "auto",
        allow_pickle=bool(arguments.allow_pickle),
        truncate=bool(arguments.truncate),
    )
    return reward_file(arguments.responses, spec, arguments.output)


def reward_job(job: Job) -> int:
    """Score what the job has stored by each of its reward models, and print the mean rewards."""
    if not job.rewards or not job.prompts:
        missing = " and ".join(name for name in ("rewards", "prompts") if not getattr(job, name))
        raise JobError(f"the job has no `{missing}`; list at least one item there")
    store = open_store(job.output)
    attempts = Attempts()
    sets = attempts.attempt(partial(load_prompts, job.prompts))
    pools = [pool for spec in job.rewards for pool in attempts.attempt(partial(RewardPool, spec))]
    attempts.end()
    stored = read_stored_responses(store, job, sets[0])
    if not stored:
        raise JobError(
            f"{store.uri}: holds no responses to the job's prompts, drawn as it says; run `expo-ray respond` on the job first"
        )
    with cluster():
        work = [
            one
            for pool in pools
            for group in stored
            for one in attempts.attempt(partial(_plan, pool, group, store))
        ]
        attempts.end()
        with Progress("reward", store, rows="responses") as progress:
            return run(work, progress)


def reward_file(responses: str, spec: RewardModel, output: str) -> int:
    """Score the responses of one file into another."""
    attempts = Attempts()
    rows = attempts.attempt(partial(read_responses, responses))
    pools = attempts.attempt(partial(RewardPool, spec))
    attempts.attempt(partial(open_output_file, output))
    attempts.end()
    (pool,), (listed,) = pools, rows
    pool.inputs(listed)  # tells what is wrong before a cluster is started
    with cluster():
        reward_store = RewardFile(output, [one.key for one in listed], _about(pool))
        todo = find_unscored(listed, pool, reward_store)
        with Progress("reward", rows="responses") as progress:
            work = Work(pool, listed[0].model or responses, listed, todo)
            return run([work], progress, flags={"backend", "allow_pickle", "truncate"})


def _plan(pool: RewardPool, group: StoredResponses, store: Store) -> Work:
    names = pool.spec.name, pool.id
    reward_store = RowStore(store, group.folder.rewards(*names), reward_from_row)
    todo = find_unscored(group.responses, pool, reward_store)
    store.put(group.folder.rewards_about(*names), (json.dumps(_about(pool), indent=1) + "\n").encode())
    return Work(pool, group.model, group.responses, todo)


def _about(pool: RewardPool) -> Mapping[str, Any]:
    """What made the rewards, for whoever looks into the folder."""
    return {
        "model": pool.model.uri,
        "identity": pool.model.identity,
        "backend": pool.spec.backend,
        "dtype": pool.dtype,
        "truncate": pool.spec.truncate,
        "id": pool.id,
    }


def run(work: Sequence[Work], progress: Progress, flags: Collection[str] = ()) -> int:
    """Score it all, one reward model after the other, and print a table; the exit status.

    Args:
        flags: see `with_flags`.
    """
    progress.expect(
        rows=sum(len(each.todo.inputs) for each in work), kept=sum(len(each.todo.stored) for each in work)
    )
    rows: list[Sequence[str]] = []
    failures: list[str] = []
    for pool in dict.fromkeys(one.pool for one in work):
        with pool:
            for one in (one for one in work if one.pool is pool):
                try:
                    scored = score_missing(one.todo, pool, progress)
                except ExpoError as error:
                    failures.append(f"{one.model} by {pool.spec.name}: {with_flags(str(error), flags)}")
                    continue
                rows.append(_row(one, scored))
                failures += _told(one, scored)
    if rows:
        print(_table(rows))
    for text in failures:
        print(f"failed: {text}", file=sys.stderr)
    progress.finish(failures)
    return FAILED if failures else 0


_HEADER = (
    "reward model",
    "model",
    "prompts",
    "reward",
    "standard error",
    "tokens",
    "scored now",
    "truncated",
)


def _row(one: Work, scored: ScoredResponses) -> Sequence[str]:
    summary = summarise_rewards(one.responses, scored.rewards)
    figures = f"{summary.mean:.4f}", f"{summary.standard_error:.4f}", f"{summary.num_tokens:.1f}"
    return (
        one.pool.spec.name,
        one.model,
        str(summary.prompts),
        *figures,
        str(scored.made),
        str(summary.truncated),
    )


def _told(one: Work, scored: ScoredResponses) -> list[str]:
    """What a user should know of responses without a score: one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for failed in scored.failed:
        reasons.setdefault(failed.error, []).append(failed.prompt_id)
    return [
        f"{one.model} by {one.pool.spec.name}: {len(ids)} response(s) have no reward, prompt {', '.join(ids[:5])}"
        f"{' and more' if len(ids) > 5 else ''}: {reason}"
        for reason, ids in reasons.items()
    ]


def _table(rows: Iterable[Sequence[str]]) -> str:
    lines = [_HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if place < 2 else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )

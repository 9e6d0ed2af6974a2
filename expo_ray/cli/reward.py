"""`expo-ray reward`: score a job's stored responses by all its reward models, or those of one file by one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence

from expo_ray.cli.exit_status import FAILED
from expo_ray.cli.flags import given_flags, with_flags
from expo_ray.cli.plan_table import align_columns
from expo_ray.config import Job, RewardModel, load_job
from expo_ray.errors import Collected, JobError
from expo_ray.evaluation.check_job import check_rewards
from expo_ray.evaluation.evaluate_job import Rewarded, RewardTask, load_responses, reward, reward_file
from expo_ray.evaluation.rewards.reward_file import read_responses
from expo_ray.evaluation.rewards.reward_model import check_reward
from expo_ray.evaluation.rewards.score_missing import ScoredResponses, summarise_rewards
from expo_ray.on_ray.cluster import cluster
from expo_ray.on_ray.rewards.pool import RewardPool
from expo_ray.status_file import StatusFile
from expo_ray.storage import open_output_file, open_store

_WITHOUT_JOB = ("responses", "reward_model", "backend", "allow_pickle", "truncate", "output")


def command(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status.

    Raises:
        ExpoError: for everything wrong with the input, before any model is loaded.
    """
    given = given_flags(arguments, _WITHOUT_JOB)
    if arguments.job and given:
        raise JobError(f"a job file and {', '.join(given)}; give one or the other")
    if arguments.job:
        return _reward_job(load_job(arguments.job))
    if not (arguments.responses and arguments.reward_model and arguments.output):
        raise JobError("give a job file, or --responses, --reward-model and --output")
    spec = RewardModel(
        model=arguments.reward_model,
        backend=arguments.backend or "auto",
        allow_pickle=bool(arguments.allow_pickle),
        truncate=bool(arguments.truncate),
    )
    return _reward_file(arguments.responses, spec, arguments.output)


def _reward_job(job: Job) -> int:
    checked = check_rewards(job)
    responses = load_responses(checked)
    with cluster(job.places("rewards")), StatusFile(open_store(job.output)) as status:
        rewarded = reward(checked, responses, [RewardPool(model) for model in checked.rewards], status)
    return print_rewards(rewarded)


def _reward_file(uri: str, spec: RewardModel, output: str) -> int:
    problems = Collected()
    with problems.catching():
        responses = read_responses(uri)
    with problems.catching():
        checked = check_reward(spec)
    with problems.catching():
        open_output_file(output)
    problems.raise_any()
    checked.inputs(responses)  # reports what is wrong before a cluster is started
    with cluster({} if spec.is_function else {"--reward-model": spec.model}):
        rewarded = reward_file(output, responses, responses[0].model or uri, RewardPool(checked))
    return print_rewards(rewarded, flags={"backend", "allow_pickle", "truncate"})


def print_rewards(rewarded: Rewarded, flags: Collection[str] = ()) -> int:
    """Print a table of mean rewards, and what has none; returns the exit status.

    Args:
        flags: see `with_flags`.
    """
    if rewarded.scored:
        rows = [_row(task, scored) for task, scored in rewarded.scored]
        print("\n".join(align_columns([_HEADER, *rows], left=2)))
    for text in rewarded.failures:
        print(f"failed: {with_flags(text, flags)}", file=sys.stderr)
    return FAILED if rewarded.failures else 0


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


def _row(task: RewardTask, scored: ScoredResponses) -> Sequence[str]:
    summary = summarise_rewards(task.responses, scored.rewards)
    return (
        task.scorer.name,
        task.model,
        str(summary.prompts),
        f"{summary.mean:.4f}",
        f"{summary.standard_error:.4f}",
        f"{summary.num_tokens:.1f}",
        str(scored.num_new),
        str(summary.truncated),
    )

"""`expo-ray run`: the whole pipeline of a job."""

from __future__ import annotations

import argparse
import sys

from expo_ray.cli.exit_status import FAILED
from expo_ray.cli.extras import require
from expo_ray.config import Job, load_job
from expo_ray.evaluation.check_job import CheckedJob, check_job
from expo_ray.evaluation.job_report import push_winners, write_report
from expo_ray.evaluation.rewards.reward_model import CheckedReward
from expo_ray.evaluation.search.stored_searches import read_stored_searches
from expo_ray.report.report_folder import PAGE
from expo_ray.report.results import PairResult, Results
from expo_ray.status_file import StatusFile
from expo_ray.storage import join_uri, local_path, open_store


def command(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status is 0, or 1 if a pair failed.

    Raises:
        ExpoError: for everything wrong with the input, before anything is started or written.
    """
    require("ray")
    return run(load_job(arguments.job), dry_run=arguments.dry_run)


def run(job: Job, *, dry_run: bool) -> int:
    """Run the pipeline of a job; the same steps as in `jobs/pipeline.py`, which is not installed with the package."""
    checked = check_job(job)
    print(describe(checked), flush=True)
    from expo_ray.on_ray.search_room import describe_room

    if dry_run:
        print(describe_room(checked))
        return 0
    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.pipeline import publish_winners, search_pairs

    with cluster(job.places("output", "pairs", "rewards")), StatusFile(open_store(job.output)) as status:
        searches = search_pairs(checked, status)
        winners = publish_winners(checked, searches, status)
        results = write_report(checked, searches, winners)
        status.finish(sorted(results.failures))
    return print_results(push_winners(results, job), job)


def describe(checked: CheckedJob) -> str:
    """Description of what the pipeline is going to do, one line for each subject."""
    job, prompts = checked.job, checked.prompts
    to_choose, to_confirm = map(len, prompts.halves())
    stored = len(read_stored_searches(checked))
    lines = [
        f"{len(checked.plans)} pair(s): {', '.join(plan.name for plan in checked.plans)}",
        f"{len(prompts)} prompts ({', '.join(each.name for each in checked.sets)}): {to_choose} to choose alpha on, "
        f"{to_confirm} to confirm it on; {job.sampling.samples} response(s) each",
        f"rewards: {', '.join(map(_reward_text, checked.rewards))}; the first one chooses",
        f"search: {job.search.method}{f', stored already for {stored} pair(s)' if stored else ''}, then {'the winners' if job.publish == 'winners' else 'every alpha'} to {job.output}",
    ]
    if job.push_to is not None:
        places = ", ".join(str(job.repo_of(pair.name)) for pair in job.pairs)
        lines.append(f"push: each winner to the Hub, in a private repository unless it is there: {places}")
    return "\n".join(lines)


def _reward_text(reward: CheckedReward) -> str:
    return f"{reward.spec.name} in {reward.dtype}" if reward.dtype else reward.spec.name


def print_results(results: Results, job: Job) -> int:
    """Print the decision of each pair, the failures, and where the report is; returns the exit status."""
    for pair in results.pairs:
        print(_line(pair))
    for name, text in results.failures.items():
        print(f"failed: {name}: {text}", file=sys.stderr)
    place = str(local_path(job.output) or job.output)
    print(f"report: {join_uri(place, PAGE)}")
    return FAILED if results.failures else 0


def _line(pair: PairResult) -> str:
    models = "".join(f"\n  {uri}" for uri in pair.published.values())
    return f"{pair.name}: {pair.reason}{models}"

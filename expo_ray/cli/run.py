"""`expo-ray run`: the whole pipeline of a job."""

from __future__ import annotations

import argparse
import os
import sys

from expo_ray.config import Job, load_job
from expo_ray.on_ray.check_job import Prepared, prepare
from expo_ray.on_ray.pipeline import run_pipeline
from expo_ray.report.report_page import PAGE
from expo_ray.report.results import PairResult, Results
from expo_ray.storage import join_uri
from expo_ray.storage.uri import expand_home

FAILED = 1


def command(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status is 0, or 1 if a pair failed.

    Raises:
        ExpoError: for everything wrong with the input, before anything is started or written.
    """
    prepared = prepare(load_job(arguments.job))
    print(described(prepared), flush=True)
    return 0 if arguments.dry_run else tell(run_pipeline(prepared), prepared.job)


def described(prepared: Prepared) -> str:
    """What the pipeline is going to do."""
    job, choose = prepared.job, prepared.prompts.halves()[0]
    rewards = ", ".join(pool.spec.name for pool in prepared.pools)
    lines = [
        f"{len(prepared.plans)} pair(s): {', '.join(plan.name for plan in prepared.plans)}",
        f"{len(prepared.prompts)} prompts ({', '.join(one.name for one in prepared.sets)}): {len(choose)} to choose alpha on, "
        f"{len(prepared.prompts) - len(choose)} to confirm it on; {job.sampling.samples} response(s) each",
        f"rewards: {rewards}; the first one chooses",
        f"search: {job.search.method}, then {'the winners' if job.publish == 'winners' else 'every alpha'} to {job.output}",
    ]
    if job.push_to is not None:
        places = ", ".join(str(job.repo_of(pair.name)) for pair in job.pairs)
        lines.append(f"push: each winner to the Hub, in a private repository unless it is there: {places}")
    return "\n".join(lines)


def tell(results: Results, job: Job) -> int:
    """Print what came of it, and where the report is; the exit status."""
    for pair in results.pairs:
        print(_line(pair))
    for name, text in results.failures.items():
        print(f"failed: {name}: {text}", file=sys.stderr)
    place = job.output if "://" in job.output else os.path.abspath(expand_home(job.output))
    print(f"report: {join_uri(place, PAGE)}")
    return FAILED if results.failures else 0


def _line(pair: PairResult) -> str:
    where = "".join(f"\n  {uri}" for uri in pair.published.values())
    return f"{pair.name}: {pair.reason}{where}"

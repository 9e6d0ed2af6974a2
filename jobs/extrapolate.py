"""`ray job submit --working-dir . -- python jobs/extrapolate.py JOB.yaml`: every pair of a job file, to published models."""

from __future__ import annotations

import argparse
import sys

from expo_ray.cli.process import guarded
from expo_ray.config import Job, load_job


def run(job: Job, *, overwrite: bool, dry_run: bool) -> int:
    # Imported here, as it takes seconds: after the arguments are known to be right and signals are handled.
    from expo_ray.cli.commands import plan_every_pair, print_outcome
    from expo_ray.cli.plan_table import describe
    from expo_ray.extrapolation.run_job import run_job
    from expo_ray.progress import Progress
    from expo_ray.status_file import StatusFile
    from expo_ray.storage import open_store

    job_plan = plan_every_pair(job, overwrite=overwrite)  # everything wrong with it, before anything starts
    print(describe(job_plan), flush=True)
    if dry_run:
        return 0

    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.extrapolation import OnRay

    with (
        cluster(job.places("output", "pairs")),
        StatusFile(open_store(job.output)) as status,
        Progress("extrapolate", status) as progress,
        OnRay(progress, device=job.device) as executor,
    ):
        # Shards in parallel; each model is published when it is whole.
        outcome = run_job(job_plan, executor, progress)
        progress.finish(sorted(outcome.failures), published=len(outcome.published))
    return print_outcome(outcome)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", metavar="JOB.yaml", help="the job file")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace models that expo-ray wrote there before"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; nothing is written")
    arguments = parser.parse_args()
    return guarded(
        lambda: run(load_job(arguments.job), overwrite=arguments.overwrite, dry_run=arguments.dry_run)
    )


if __name__ == "__main__":
    sys.exit(main())

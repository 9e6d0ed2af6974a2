"""`ray job submit --working-dir . -- python jobs/pipeline.py JOB.yaml`: pairs in; the best alpha of each, published, and a report out."""

from __future__ import annotations

import argparse
import sys

from expo_ray.cli.process import guarded
from expo_ray.config import Job, load_job


def run(job: Job, *, dry_run: bool) -> int:
    # Slow imports: deferred until the arguments are parsed and signals are handled.
    from expo_ray.cli.run import describe, print_results
    from expo_ray.evaluation.check_job import check_job
    from expo_ray.evaluation.job_report import push_winners, write_report
    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.pipeline import publish_winners, search_pairs
    from expo_ray.on_ray.search_room import describe_room
    from expo_ray.status_file import StatusFile
    from expo_ray.storage import open_store

    checked = check_job(job)  # everything wrong with it, before anything starts
    print(describe(checked), flush=True)
    if dry_run:
        print(describe_room(checked))
        return 0
    with cluster(job.places("output", "pairs", "rewards")), StatusFile(open_store(job.output)) as status:
        # Of each pair, several at once: respond, score, decide; resumable.
        searches = search_pairs(checked, status)
        winners = publish_winners(checked, searches, status)
        results = write_report(checked, searches, winners)
        status.finish(sorted(results.failures))
    # Last: sending whole models may take longer than anybody waits for the report.
    return print_results(push_winners(results, job), job)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", metavar="JOB.yaml", help="the job file")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and stop; nothing is written"
    )
    arguments = parser.parse_args()
    return guarded(lambda: run(load_job(arguments.job), dry_run=arguments.dry_run))


if __name__ == "__main__":
    sys.exit(main())

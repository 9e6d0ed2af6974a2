"""`ray job submit --working-dir . -- python jobs/pipeline.py JOB.yaml`: pairs in; the best alpha of each, published, and a report out."""

from __future__ import annotations

import argparse
import sys

from expo_ray.cli.process import guarded
from expo_ray.config import load_job


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", metavar="JOB.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and stop; nothing is written"
    )
    arguments = parser.parse_args()
    return guarded(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    # Seconds to import, so not before the arguments are known to be right.
    from expo_ray.cli.run import described, tell
    from expo_ray.on_ray.check_job import prepare
    from expo_ray.on_ray.pipeline import run_pipeline

    prepared = prepare(load_job(arguments.job))
    print(described(prepared), flush=True)
    if arguments.dry_run:
        return 0
    results = run_pipeline(prepared)  # plan, search by in-place swap, publish, report
    return tell(results, prepared.job)


if __name__ == "__main__":
    sys.exit(main())

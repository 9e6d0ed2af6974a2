"""`ray job submit --working-dir . -- python jobs/evaluate.py JOB.yaml`: answers of all pairs, alphas and models of a job, scored."""

from __future__ import annotations

import argparse
import sys

from expo_ray.cli.process import guarded
from expo_ray.config import load_job


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", metavar="JOB.yaml")
    arguments = parser.parse_args()
    return guarded(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    # Seconds to import, so not before the arguments are known to be right.
    from expo_ray.cli.respond import respond
    from expo_ray.cli.reward import reward_job

    job = load_job(arguments.job)
    answered = respond(job)
    scored = reward_job(job)
    return max(answered, scored)


if __name__ == "__main__":
    sys.exit(main())

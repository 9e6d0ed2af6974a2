"""`ray job submit --working-dir . -- python jobs/evaluate.py JOB.yaml`: answers of all pairs, alphas and models of a job, scored."""

from __future__ import annotations

import argparse
import sys

from expo_ray.cli.process import guarded
from expo_ray.config import Job, load_job


def run(job: Job) -> int:
    # Slow imports: deferred until the arguments are parsed and signals are handled.
    from expo_ray.cli.respond import print_responses
    from expo_ray.cli.reward import print_rewards
    from expo_ray.evaluation.check_job import check_evaluation, store_job_prompts
    from expo_ray.evaluation.evaluate_job import load_responses, respond, reward
    from expo_ray.on_ray.capacity import find_devices, settled
    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.rewards.pool import RewardPool
    from expo_ray.on_ray.serving.serve_models import serving
    from expo_ray.status_file import StatusFile
    from expo_ray.storage import open_store

    checked = check_evaluation(job)  # everything wrong with it, before anything starts
    store_job_prompts(checked)
    store = open_store(job.output)
    with cluster(job.places("pairs", "models", "rewards")), StatusFile(store) as status:
        devices = find_devices(job.serving, store)
        pools = [RewardPool(model, device=devices.rewards) for model in checked.rewards]
        for pool in pools:
            pool.check_room()
        with serving(checked.plans, job.models, settled(job.serving, devices)) as endpoint:
            exit_status = print_responses(respond(checked, endpoint.client(), status))
        # The engines are gone, so that the reward models have the cluster for themselves.
        rewarded = reward(checked, load_responses(checked), pools, status)
    return max(exit_status, print_rewards(rewarded))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", metavar="JOB.yaml", help="the job file")
    arguments = parser.parse_args()
    return guarded(lambda: run(load_job(arguments.job)))


if __name__ == "__main__":
    sys.exit(main())

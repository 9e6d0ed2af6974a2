"""Push the winners of a job to the Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from expo_ray.config import Job
from expo_ray.errors import ExpoError
from expo_ray.extrapolation.push import plan_push, push

log = logging.getLogger("expo_ray")


def push_winners(job: Job, winners: Mapping[str, str]) -> dict[str, str]:
    """Push each winner to the repository that `push_to` names; what is there already is left alone.

    Args:
        winners: the published folder of each pair that has one.

    Returns:
        What went wrong, by pair; a pair that fails does not stop the others.
    """
    failures: dict[str, str] = {}
    for pair, folder in winners.items():
        repo_id = job.repo_of(pair)
        if repo_id is None:
            continue
        try:
            log.info("%s: pushed to %s", pair, push(plan_push(folder, repo_id), private=True))
        except ExpoError as error:
            failures[pair] = f"published at {folder}, but not pushed to {repo_id}: {error}"
            log.error("%s failed: %s", pair, failures[pair])
    return failures

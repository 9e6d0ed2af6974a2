"""Push the winners of a job to the Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from expo_ray.config import Job
from expo_ray.errors import ExpoError
from expo_ray.published.push import plan_push, push

log = logging.getLogger("expo_ray")


@dataclass
class Pushed:
    """What came of pushing.

    Attributes:
        addresses: on the Hub, by pair.
        failures: what went wrong, by pair; a pair that fails does not stop the others.
    """

    addresses: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def push_winners(job: Job, winners: Mapping[str, str]) -> Pushed:
    """Push each winner to the repository that `push_to` names; what is there already is left alone.

    Args:
        winners: the published folder of each pair that has one.
    """
    found = Pushed()
    for pair, folder in winners.items():
        repo_id = job.repo_of(pair)
        if repo_id is None:
            continue
        try:
            found.addresses[pair] = push(plan_push(folder, repo_id), private=True)
            log.info("%s: pushed to %s", pair, found.addresses[pair])
        except ExpoError as error:
            found.failures[pair] = f"published at {folder}, but not pushed to {repo_id}: {error}"
            log.error("%s failed: %s", pair, found.failures[pair])
    return found

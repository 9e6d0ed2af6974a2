"""A job that answers behind Ray Serve, without an engine, until it is told to end: prints its URL, and deletes its application."""

from __future__ import annotations

import logging
import signal
import sys

from ray import serve

from expo_ray.config import Serving
from expo_ray.on_ray.cluster import cluster
from expo_ray.on_ray.serving.endpoint import http_proxy
from expo_ray.on_ray.serving.engine_groups import Deployed, deploy, job_name


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
class Answers:
    """Answers with a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self) -> str:
        return self._name


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("expo_ray").setLevel(logging.INFO)
    with cluster(), http_proxy(Serving(port=0)) as (url, path):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        bound = Answers.bind(job_name())  # type: ignore[attr-defined]
        with deploy(bound, Deployed("", job_name()), path) as running:
            running.wait(120)
            sys.stdout.write(f"{url} {job_name()}\n")
            sys.stdout.flush()
            signal.pause()


if __name__ == "__main__":
    main()

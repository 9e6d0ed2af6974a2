"""A job with an endpoint and no engine, until it is told to end: prints its URL and the name of its application, which it deletes."""

from __future__ import annotations

import logging
import signal
import sys

from expo_ray.config import Serving
from expo_ray.on_ray.cluster import cluster
from expo_ray.on_ray.serving.endpoint import http_proxy, ingress
from expo_ray.on_ray.serving.engine_groups import job_name


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("expo_ray").setLevel(logging.INFO)
    settings = Serving(port=0)
    with cluster(), http_proxy(settings) as (url, path):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with ingress((), url, path, settings, {"late": job_name()}):
            sys.stdout.write(f"{url} {job_name()}\n")
            sys.stdout.flush()
            signal.pause()


if __name__ == "__main__":
    main()

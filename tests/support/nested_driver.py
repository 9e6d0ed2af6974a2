"""A spawned child of an actor that connects to the cluster as another driver, as vLLM's engine core does on a GPU.

Prints, as JSON, the address that the child reached and the package that an actor of that driver imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from multiprocessing.queues import Queue
from typing import Any

import ray

from expo_ray.on_ray.cluster import cluster

WAIT_S = 60


def _actor(kind: type) -> Any:
    return ray.remote(num_cpus=0)(kind).remote()


def connect(queue: Queue[dict[str, str]], runtime_env: dict[str, Any]) -> None:
    ray.init(runtime_env=runtime_env)

    class Worker:
        def package(self) -> str:
            import expo_ray

            return expo_ray.__file__

    queue.put(
        {
            "address": ray.get_runtime_context().gcs_address,
            "package": ray.get(_actor(Worker).package.remote(), timeout=WAIT_S),
        }
    )


class Replica:
    def start_engine_core(self) -> dict[str, str]:
        from tests.support import nested_driver  # a spawned child imports its target by name

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # vLLM does so before it spawns
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(
            target=nested_driver.connect, args=(queue, dict(ray.get_runtime_context().runtime_env))
        )
        process.start()
        try:
            return dict(queue.get(timeout=WAIT_S))
        finally:
            process.kill()


if __name__ == "__main__":
    with cluster():
        reached = ray.get(_actor(Replica).start_engine_core.remote(), timeout=2 * WAIT_S)
        sys.stdout.write(json.dumps(reached) + "\n")

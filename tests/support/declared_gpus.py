"""`expo-ray run` on a machine whose Ray is told of GPUs that are not there: places are real, engines and actors compute on CPUs.

`python declared_gpus.py GPUS BYTES REPORT JOB.yaml`. Everything is as on GPUs but for the functions that are replaced below.
What Ray has given to each engine and actor is appended to REPORT, a line of JSON each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util import placement_group_table

from expo_ray.cli.process import main
from expo_ray.config import Serving
from expo_ray.evaluation.placement import Place
from expo_ray.on_ray import capacity, cluster, gpus
from expo_ray.on_ray.rewards import crew
from expo_ray.on_ray.serving import engine_groups, engine_settings
from expo_ray.on_ray.serving.engine_groups import EngineGroup, deploy_group


def report(file: str, **line: Any) -> None:
    with open(file, "a") as lines:
        lines.write(json.dumps(line) + "\n")


def declare(many: int, gpu_bytes: int, file: str) -> None:
    """Let this process start a Ray with GPUs, and plan for them."""
    start, arguments = cluster._init_twice, engine_settings.engine_arguments
    bundles, environment = engine_settings._gpu_placement, engine_settings._environment

    class Actor(crew.RewardActor):
        """Computes on a CPU what it was given a GPU for."""

        def __init__(self, model: Any, dtype: str, num_gpus: float) -> None:
            super().__init__(model, dtype, 0)
            ids = ray.get_runtime_context().get_accelerator_ids()["GPU"]
            report(file, kind="actor", model=model.spec.name, share=num_gpus, gpus=ids, pid=os.getpid())

        def load(self, probe: Sequence[Sequence[int]], compares: bool = False) -> str:
            with gpus.starting_alone(shared=True):
                return super().load(probe, compares)

    @contextmanager
    def observed(group: EngineGroup) -> Iterator[Any]:
        with deploy_group(group) as engines:
            yield engines
            slots = group.slots(ask=True)
            groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
            report(
                file,
                kind="groups",
                slots=slots,
                groups=[[group["strategy"], [*group["bundles"].values()]] for group in groups],
            )

    waited = engine_groups.Deployed.wait

    def wait(engines: engine_groups.Deployed, timeout_s: float) -> None:
        waited(engines, timeout_s)
        if engines.what == "an engine":
            report(file, kind="engine")

    def on_cpu(settings: Serving, place: Place | None, *, for_pair: bool) -> dict[str, Any]:
        report(file, kind="arguments", **arguments(settings, place, for_pair=for_pair))
        return arguments(settings, None, for_pair=for_pair)

    cluster._init_twice = lambda failure, **options: start(failure, num_gpus=many, **options)
    gpus.smallest_gpu_bytes = lambda: gpu_bytes
    engine_settings.engine_arguments = on_cpu
    engine_settings._gpu_placement = lambda place: {**bundles(place), "accelerator_config": {"kind": "cpu"}}
    engine_settings._environment = lambda place, threads: environment(None, threads)
    crew.RewardActor = Actor  # type: ignore[misc]
    vars(engine_groups)["deploy_group"] = observed
    engine_groups.Deployed.wait = wait  # type: ignore[method-assign, assignment]
    vars(capacity)["engine_built_for_gpus"] = lambda: True


if __name__ == "__main__":
    declare(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    sys.exit(main(["run", sys.argv[4]]))

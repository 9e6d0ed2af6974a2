"""An endpoint for pairs and models, with all their engines, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

from expo_ray.config import PublishedModel, Serving
from expo_ray.errors import JobError, Problems, in_one_line
from expo_ray.evaluation.gpu_needs import engine_needs
from expo_ray.evaluation.placement import Place, place
from expo_ray.evaluation.responses.endpoint import KEY_VARIABLE
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.on_ray.capacity import await_room, settled
from expo_ray.on_ray.gpus import log_placement
from expo_ray.on_ray.serving.endpoint import Endpoint, http_proxy, ingress
from expo_ray.on_ray.serving.engine_adapter import check_version
from expo_ray.on_ray.serving.engine_groups import EngineGroup, deploy_group, model_group, pair_group

log = logging.getLogger("expo_ray")


@contextlib.contextmanager
def serving(
    pairs: Sequence[PairPlan], models: Sequence[PublishedModel], settings: Serving
) -> Iterator[Endpoint]:
    """Serve models on the connected Ray cluster: engines answer when the block begins, and are stopped when it ends.

    A model whose engines do not start is named among the endpoint's failures, and the others are served.

    Args:
        pairs: see `plan_served_pairs`; the alphas of a scaled adapter are served side by side.

    Raises:
        JobError: if the port is taken.
        Problems: if no engine starts.
    """
    check_version()
    settings = settled(settings)
    with http_proxy(settings) as (url, path), ExitStack() as stack:
        groups = _groups(pairs, models, settings)
        failures = _start_all(groups, settings, stack)
        running = [group for group in groups if group.name not in failures]
        stack.enter_context(ingress(running, url, path, settings, failures))
        slots = sum(group.slots(ask=settings.device == "cuda") for group in running)
        yield Endpoint(url, slots, settings.api_key_env or KEY_VARIABLE, failures)


def _groups(
    pairs: Sequence[PairPlan], models: Sequence[PublishedModel], settings: Serving
) -> list[EngineGroup]:
    places = _place_engines(pairs, models, settings) if settings.device == "cuda" else {}
    many = len(pairs) + len(models)
    return [
        *(pair_group(plan, settings, places.get(plan.name), groups=many) for plan in pairs),
        *(model_group(model, settings, places.get(model.name), groups=many) for model in models),
    ]


def _place_engines(
    pairs: Sequence[PairPlan], models: Sequence[PublishedModel], settings: Serving
) -> Mapping[str, Place]:
    """Find a place for engines that have all GPUs for themselves, by pair and model.

    Raises:
        ExpoError: if the GPUs cannot hold them.
    """
    needs = engine_needs(pairs, models, settings)
    placement = await_room(lambda nodes: place(needs, (), nodes), settings.start_timeout)
    log_placement(placement)
    return {engine.need.name: engine for engine in placement.engines}


def _start_all(groups: Sequence[EngineGroup], settings: Serving, stack: ExitStack) -> dict[str, str]:
    """Start all engines at the same time and wait for them; returns why some have not started, by name.

    Raises:
        Problems: if none has.
    """
    deadline = time.monotonic() + settings.start_timeout
    deployed = {group.name: stack.enter_context(deploy_group(group)) for group in groups}
    failures: dict[str, JobError] = {}
    for name, engines in deployed.items():
        try:
            engines.wait(max(0.0, deadline - time.monotonic()))
        except JobError as error:
            failures[name] = error
            log.error("%s failed: %s", name, in_one_line(error))
    if len(failures) == len(groups):
        raise Problems([*failures.values()])
    return {name: in_one_line(error) for name, error in failures.items()}

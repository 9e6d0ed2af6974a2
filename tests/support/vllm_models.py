"""Models of vLLM in this process, as a worker of any rank holds them; no engine is started."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch

from expo_ray.checkpoint.folder import read_checkpoint
from expo_ray.storage import open_store

Dtype = Literal["auto", "bfloat16", "float32"]
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "127.0.0.1",
}


@contextmanager
def worker(
    folder: Path, workers: int, rank: int, dtype: Dtype = "auto", device: str = "cpu"
) -> Iterator[Any]:
    """The model in `folder` as worker `rank` of `workers` makes it, before its weights are loaded; on `meta` it takes no memory.

    vLLM's groups of processes have this one as their only member; what layers read of them is replaced.
    """
    with patch.dict(os.environ, _ENVIRONMENT):
        yield from _make_worker(folder, workers, rank, dtype, device)


def _make_worker(folder: Path, workers: int, rank: int, dtype: Dtype, device: str) -> Iterator[Any]:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=str(folder), tensor_parallel_size=workers, dtype=dtype, enforce_eager=True, max_model_len=64,
        skip_tokenizer_init=True, distributed_executor_backend="mp" if workers > 1 else None,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        _join_groups(parallel_state)
        groups = [parallel_state.get_tp_group()]
        if parallel_state._EP is not None:
            groups.append(parallel_state._EP)
        with ExitStack() as stack:
            for group in groups:
                stack.enter_context(patch.object(group, "world_size", workers))
                stack.enter_context(patch.object(group, "rank_in_group", rank))
            computes_in: Any = config.model_config.dtype
            with set_default_torch_dtype(computes_in), torch.device(device):
                model = initialize_model(config)
            yield model


def _join_groups(parallel_state: Any) -> None:
    if not torch.distributed.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        parallel_state.init_distributed_environment(
            1, 0, distributed_init_method=address, local_rank=0, backend="gloo"
        )
    parallel_state.destroy_model_parallel()  # the groups that a mixture needs are others than a dense model's
    parallel_state.initialize_model_parallel(1, 1)


# Enough heads and experts for eight workers; keys and values are shared by several of them.
ADAPTED_SIZES = {
    "num_attention_heads": 8, "num_key_value_heads": 2, "n_head": 8, "intermediate_size": 128, "ffn_dim": 128,
    "num_local_experts": 8, "num_experts": 8,
}  # fmt: skip

# Its loader computes with values, and the engine packs more than it can show.
_NOT_SWAPPED: Mapping[str, tuple[str, dict[str, Any]]] = {"mamba": ("mamba", {"state_size": 8})}


def save_architecture(name: str, folder: Path, sizes: Mapping[str, int], seed: int = 0) -> Path:
    """Save a tiny model of an architecture in bf16; `sizes` replace those among its settings that it has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.swap_architectures import ARCHITECTURES, SIZES

    kind, changes = {**ARCHITECTURES, **_NOT_SWAPPED}[name]
    settings = {**SIZES, **changes}
    settings |= {key: value for key, value in sizes.items() if key in settings}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def forms_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of the tensors of a checkpoint."""
    checkpoint = read_checkpoint(open_store(str(folder)))
    return {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}

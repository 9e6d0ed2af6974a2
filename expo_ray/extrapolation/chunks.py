"""A shard as a stream of chunks: which bytes of which parent become which bytes of the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from expo_ray.checkpoint.tensors import DTYPE_BYTES
from expo_ray.checkpoint.vocabulary import RowRun
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.plan import ShardPlan


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive elements of one tensor that one rule makes.

    Attributes:
        first: index of the first element within the tensor.
        count: number of elements.
        sft_first: index of the first element within sft's tensor, or None where dpo is kept.
    """

    plan: TensorPlan
    first: int
    count: int
    sft_first: int | None

    @property
    def out_bytes(self) -> int:
        return self.count * DTYPE_BYTES[self.plan.dtype]


def chunks_of(shard: ShardPlan, chunk_bytes: int) -> Iterator[Chunk]:
    """The chunks of a shard in file order; none needs a buffer of more than `chunk_bytes`."""
    for plan in shard.tensors:
        for run in plan.runs or (RowRun(0, 0, 1),):
            yield from _chunks_of_run(plan, run, chunk_bytes)


def _chunks_of_run(plan: TensorPlan, run: RowRun, chunk_bytes: int) -> Iterator[Chunk]:
    row = plan.dpo.numel // plan.shape[0] if plan.runs else plan.dpo.numel
    widest = max(
        DTYPE_BYTES[dtype] for dtype in (plan.dtype, plan.dpo.dtype, plan.sft.dtype if plan.sft else "U8")
    )
    step = max(1, chunk_bytes // widest)
    begin, end = run.dpo_first * row, (run.dpo_first + run.count) * row
    for first in range(begin, end, step):
        sft_first = None
        if plan.sft is not None and run.sft_first is not None:
            sft_first = run.sft_first * row + first - begin
        yield Chunk(plan, first, min(step, end - first), sft_first)

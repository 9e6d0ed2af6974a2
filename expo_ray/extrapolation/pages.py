"""A shard as pages of the output file, and each page as chunks: which bytes of which parent become which bytes of the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from expo_ray.checkpoint.tensors import DTYPE_BYTES
from expo_ray.checkpoint.vocabulary import RowRun
from expo_ray.extrapolation.layout import ShardPlan
from expo_ray.extrapolation.match import TensorPlan


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

    def split(self, count: int) -> tuple[Chunk, Chunk]:
        """The first `count` elements, and the others."""
        sft_first = None if self.sft_first is None else self.sft_first + count
        rest = replace(self, first=self.first + count, count=self.count - count, sft_first=sft_first)
        return replace(self, count=count), rest


@dataclass(frozen=True, slots=True)
class Page:
    """Consecutive bytes of the output file.

    Attributes:
        head: what of the file's header lies in this page, in front of the chunks.
    """

    head: bytes
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return len(self.head) + sum(chunk.out_bytes for chunk in self.chunks)


def pages_of(shard: ShardPlan, page_bytes: int, chunk_bytes: int) -> Iterator[Page]:
    """The whole file of a shard, front to back.

    Args:
        page_bytes: size of every page but the last, as long as elements end there.
        chunk_bytes: no chunk needs a larger buffer, for its output or for either parent.
    """
    head, chunks, room = shard.header, list[Chunk](), page_bytes
    while len(head) > page_bytes:
        yield Page(head[:page_bytes], ())
        head = head[page_bytes:]
    room -= len(head)
    for run in _runs_of(shard):
        rest, (width, widest) = run, _widths(run.plan)
        while rest.count:
            count = min(rest.count, max(1, chunk_bytes // widest), room // width)
            if count:
                chunk, rest = rest.split(count)
                chunks.append(chunk)
                room -= chunk.out_bytes
            else:
                yield Page(head, tuple(chunks))
                head, chunks, room = b"", [], max(page_bytes, width)
    yield Page(head, tuple(chunks))


def _runs_of(shard: ShardPlan) -> Iterator[Chunk]:
    """Elements in file order, as long as one rule makes them."""
    for plan in shard.tensors:
        row = plan.dpo.numel // plan.shape[0] if plan.runs else plan.dpo.numel
        for run in plan.runs or (RowRun(0, 0, 1),):
            sft_first = None if plan.sft is None or run.sft_first is None else run.sft_first * row
            yield Chunk(plan, run.dpo_first * row, run.count * row, sft_first)


def _widths(plan: TensorPlan) -> tuple[int, int]:
    """Bytes of an element of the output, and of the widest of output and parents."""
    dtypes = (plan.dtype, plan.dpo.dtype, plan.sft.dtype if plan.sft else plan.dtype)
    return DTYPE_BYTES[plan.dtype], max(DTYPE_BYTES[dtype] for dtype in dtypes)

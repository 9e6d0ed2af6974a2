"""Pieces of the copies of an index map: rows of elements that are computed at once, and where a parameter takes them."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from expo_ray.extrapolation.match import TensorPlan
from expo_ray.serving.index_map import Axis, Copy

# Elements that a thread computes at a time: its buffers stay in the processor's cache.
PIECE = 1 << 19
# Blocks of the kernel begin at multiples of this; pieces that do are computed in its fast way throughout.
_BLOCK = 2048
# Elements skipped between two that are taken, above which they are read one by one.
_LARGEST_GAP = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of elements of one tensor, and their places in a parameter.

    Attributes:
        first: index in the tensor of the first row's first element.
        rows, run, pitch: number of rows, elements of each, and elements from one row to the next in the tensor.
        target: index in the parameter of the first element.
        taken: sizes, strides within the rows (all `rows * run` elements one after the other) and strides in the parameter.
    """

    first: int
    rows: int
    run: int
    pitch: int
    target: int
    taken: tuple[Axis, ...]

    @property
    def count(self) -> int:
        """Number of elements that are computed."""
        return self.rows * self.run

    @property
    def is_dense(self) -> bool:
        """True if the parameter takes the elements one after the other, as they are computed."""
        return all(axis.source == axis.target for axis in self.taken) and self.count == math.prod(
            axis.size for axis in self.taken
        )


def pieces_of(copy: Copy, most: int = PIECE) -> Iterator[Piece]:
    """Cut a copy into pieces of at most `most` elements, as far as rows allow."""
    axes = [axis for axis in copy.axes if axis.source]
    repeated = tuple(axis for axis in copy.axes if not axis.source)
    inner = axes.pop() if axes and axes[-1].source <= _LARGEST_GAP else Axis(1, 1, 1)
    row = axes.pop() if axes else Axis(1, 0, 0)
    run = (inner.size - 1) * inner.source + 1
    for steps in itertools.product(*(range(axis.size) for axis in axes)):
        first = copy.source + sum(step * axis.source for step, axis in zip(steps, axes, strict=True))
        target = copy.target + sum(step * axis.target for step, axis in zip(steps, axes, strict=True))
        at_once = max(1, most // run)
        for begin in range(0, row.size, at_once):
            rows = Axis(min(at_once, row.size - begin), row.source, row.target)
            begins = first + begin * row.source, target + begin * row.target
            yield from _cut(*begins, rows, inner, repeated=repeated, most=most)


def _cut(
    first: int, target: int, rows: Axis, inner: Axis, *, repeated: tuple[Axis, ...], most: int
) -> Iterator[Piece]:
    """Cut a single row where blocks of the kernel begin; several rows are one piece."""
    done = 0
    while done < inner.size:
        size = inner.size - done
        if rows.size == 1 and inner.source == 1:
            size = min(size, most - (first + done) % _BLOCK)
        run = (size - 1) * inner.source + 1
        taken = (Axis(rows.size, run, rows.target), Axis(size, inner.source, inner.target), *repeated)
        kept = tuple(axis for axis in taken if axis.size > 1)
        yield Piece(
            first + done * inner.source, rows.size, run, rows.source, target + done * inner.target, kept
        )
        done += size


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of elements of a piece that one rule computes.

    Attributes:
        first, rows, run, pitch: as of a piece.
        offset: number of the piece's elements in front of it.
        sft_first: index in sft's tensor of the first element; None where dpo is kept.
    """

    first: int
    rows: int
    run: int
    pitch: int
    offset: int
    sft_first: int | None

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.rows * self.run


def parts_of(tensor: TensorPlan, piece: Piece) -> Iterator[Part]:
    """Cut a piece where the rows of a vocabulary have other partners in sft, or none."""
    if not tensor.runs:
        partner = None if tensor.sft is None else piece.first
        yield Part(piece.first, piece.rows, piece.run, piece.pitch, 0, partner)
        return
    for row in range(piece.rows):
        yield from _matched(tensor, piece.first + row * piece.pitch, piece.run, row * piece.run)


def _matched(tensor: TensorPlan, first: int, count: int, offset: int) -> Iterator[Part]:
    """Parts of consecutive elements whose rows have consecutive partners in sft."""
    width = tensor.base.numel // tensor.shape[0]
    begins = [run.dpo_first for run in tensor.runs]
    while count:
        run = tensor.runs[bisect_right(begins, first // width) - 1]
        size = min(count, (run.dpo_first + run.count) * width - first)
        partner = None if run.sft_first is None else first + (run.sft_first - run.dpo_first) * width
        yield Part(first, 1, size, 0, offset, partner if tensor.sft else None)
        first, count, offset = first + size, count - size, offset + size

"""The weights of a pair as one worker of an engine holds them: it reads and computes only its slices of both parents.

Rows of a tensor are one stretch of a file. Columns, which row-parallel layers take, are short runs, a few kilobytes apart; a call of
the operating system for each would cost more than the arithmetic, and whole rows as many bytes as without slices. So the files are
mapped into memory: long runs are computed where the page cache holds them, without a copy, and short ones are gathered first.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from expo_ray.arithmetic.cpu.kernel import CpuKernel
from expo_ray.arithmetic.kernels import load_kernel
from expo_ray.arithmetic.rule import Rule, random_key
from expo_ray.arithmetic.sums import refuse_broken
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.tensors import DTYPE_BYTES, Tensor
from expo_ray.errors import InputChanged
from expo_ray.extrapolation.layout import ShardPlan, out_bytes
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import Step, stepped
from expo_ray.serving.index_map import Axis, Copy, Fill, IndexMap
from expo_ray.serving.weights import TORCH_DTYPES
from expo_ray.storage import open_store

# Elements that a thread computes at a time: its buffers stay in the processor's cache.
PIECE = 1 << 19
# Blocks of the kernel begin at multiples of this; pieces that do are computed in its fast way throughout.
_BLOCK = 2048
# Elements skipped between two that are taken, above which they are read one by one.
_LARGEST_GAP = 8

Words = np.ndarray[Any, np.dtype[Any]]
_NOTHING: Words = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True)
class Work:
    """What was done: bytes of both parents that were read, and elements that were computed."""

    bytes_read: int = 0
    elements: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes_read + other.bytes_read, self.elements + other.elements)


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


def pieces_of(copy: Copy) -> Iterator[Piece]:
    """Cut a copy into pieces of at most `PIECE` elements, as far as rows allow."""
    axes = [axis for axis in copy.axes if axis.source]
    repeated = tuple(axis for axis in copy.axes if not axis.source)
    inner = axes.pop() if axes and axes[-1].source <= _LARGEST_GAP else Axis(1, 1, 1)
    row = axes.pop() if axes else Axis(1, 0, 0)
    run = (inner.size - 1) * inner.source + 1
    for steps in itertools.product(*(range(axis.size) for axis in axes)):
        first = copy.source + sum(step * axis.source for step, axis in zip(steps, axes, strict=True))
        target = copy.target + sum(step * axis.target for step, axis in zip(steps, axes, strict=True))
        at_once = max(1, PIECE // run)
        for begin in range(0, row.size, at_once):
            rows = Axis(min(at_once, row.size - begin), row.source, row.target)
            yield from _cut(first + begin * row.source, target + begin * row.target, rows, inner, repeated)


def _cut(first: int, target: int, rows: Axis, inner: Axis, repeated: tuple[Axis, ...]) -> Iterator[Piece]:
    """Cut a single row where blocks of the kernel begin; several rows are one piece."""
    done = 0
    while done < inner.size:
        size = inner.size - done
        if rows.size == 1 and inner.source == 1:
            size = min(size, PIECE - (first + done) % _BLOCK)
        run = (size - 1) * inner.source + 1
        taken = (Axis(rows.size, run, rows.target), Axis(size, inner.source, inner.target), *repeated)
        kept = tuple(axis for axis in taken if axis.size > 1)
        yield Piece(
            first + done * inner.source, rows.size, run, rows.source, target + done * inner.target, kept
        )
        done += size


class Slices:
    """Computes the parameters of one worker at any step, in a few threads.

    Args:
        plan: whose parents are on this node, as files; no adapter is merged in it.
        index_map: without an obstacle.
        threads: that compute.

    Attributes:
        work: all that was read and computed so far.

    Raises:
        InputChanged: if a parent is no longer the one that was planned.
    """

    def __init__(self, plan: PairPlan, index_map: IndexMap, threads: int) -> None:
        assert not index_map.obstacle
        self._plan, self.index_map = plan, index_map
        self._files = _MappedFiles([plan.sft, plan.dpo])
        self._pool = ThreadPoolExecutor(threads, "slices")
        self._buffers = threading.local()
        self.work = Work()

    @cached_property
    def _pieces(self) -> Mapping[str, Sequence[tuple[str, Sequence[Piece]]]]:
        """Of each parameter: names of tensors, and the pieces of them."""
        return {
            name: [(copy.tensor, tuple(pieces_of(copy))) for copy in copies]
            for name, copies in self.index_map.by_parameter.items()
        }

    @cached_property
    def _fills(self) -> Mapping[str, Sequence[Fill]]:
        fills: dict[str, list[Fill]] = {}
        for fill in self.index_map.fills:
            fills.setdefault(fill.parameter, []).append(fill)
        return fills

    def at(self, step: Step, made: Words = _NOTHING) -> StepSlices:
        """The same slices at a step.

        Args:
            made: the first bytes of the shards' files at this step, one after another, where they are computed already.

        Raises:
            InputChanged: if a parent is no longer the one that was planned.
        """
        self.check()
        return StepSlices(self, stepped(self._plan, step), step.alpha, made)

    def check(self) -> None:
        """Check that the parents are those that were planned.

        Raises:
            InputChanged: if one is not.
        """
        self._files.check()

    def close(self) -> None:
        """End the threads and give the files back."""
        self._pool.shutdown()
        self._files.close()

    def _scratch(self, use: str, count: int, width: int) -> Words:
        """Memory of the calling thread for `count` elements of `width` bytes."""
        kept: dict[str, Words] = self._buffers.__dict__
        if use not in kept or kept[use].nbytes < count * width:
            kept[use] = np.empty(count * width, np.uint8)
        return kept[use][: count * width].view(f"V{width}")


class StepSlices:
    """The parameters of one worker at one step."""

    def __init__(self, slices: Slices, plan: PairPlan, alpha: float, made: Words) -> None:
        self.slices, self._plan, self._alpha = slices, plan, alpha
        self._tensors = {tensor.name: tensor for shard in plan.shards for tensor in shard.tensors}
        self._made = dict(_whole_tensors(plan.shards, made))

    def begin(self, outs: Mapping[str, torch.Tensor]) -> Pending:
        """Begin to fill parameters, by name: contiguous tensors in the memory of the CPU, of the parameter's shape and any dtype.

        Values are rounded once more if that dtype does not hold them, as the engine's own loader does.
        """
        pool = self.slices._pool
        futures: list[Future[Work]] = []
        for name, out in outs.items():
            assert out.is_contiguous(), name
            assert out.device.type == "cpu", name
            for fill in self.slices._fills.get(name, ()):
                _strided(out, fill.target, fill.axes).fill_(fill.value)
            for tensor, pieces in self.slices._pieces[name]:
                planned = self._tensors[tensor]
                futures += [pool.submit(self._compute, planned, piece, out) for piece in pieces]
        return Pending(self.slices, futures)

    def fill(self, outs: Mapping[str, torch.Tensor]) -> None:
        """Fill parameters, see `begin`.

        Raises:
            ArithmeticFault: if the result holds NaN or infinities.
            InputChanged: if a parent is no longer the one that was planned.
        """
        self.begin(outs).wait()
        self.slices.check()

    def _compute(self, tensor: TensorPlan, piece: Piece, out: torch.Tensor) -> Work:
        """Compute a piece into its place in `out`."""
        dtype, width = TORCH_DTYPES[tensor.dtype], DTYPE_BYTES[tensor.dtype]
        if piece.is_dense and out.dtype == dtype:
            return self._compute_into(tensor, piece, out.data_ptr() + piece.target * width)
        scratch = self.slices._scratch("out", piece.count, width)
        work = self._compute_into(tensor, piece, scratch.ctypes.data)
        values = torch.from_numpy(scratch.view(np.uint8)).view(dtype)
        taken = torch.as_strided(
            values, [axis.size for axis in piece.taken], [axis.source for axis in piece.taken]
        )
        _strided(out, piece.target, piece.taken).copy_(taken)
        return work

    def _compute_into(self, tensor: TensorPlan, piece: Piece, out: int) -> Work:
        """Compute all elements of a piece, one after the other from the address `out` on, or copy what is made already."""
        if tensor.name in self._made:
            width = DTYPE_BYTES[tensor.dtype]
            target = np.ctypeslib.as_array((ctypes.c_uint8 * (piece.count * width)).from_address(out))
            _gather(self._made[tensor.name], piece, piece.first, target.view(f"V{width}"))
            return Work()
        if not tensor.runs:
            return self._compute_rows(tensor, piece, piece.first if tensor.sft else None, out)
        work, width = Work(), DTYPE_BYTES[tensor.dtype]
        for row in range(piece.rows):
            for part, sft_first in _matched(tensor, piece.first + row * piece.pitch, piece.run):
                work += self._compute_rows(tensor, part, sft_first, out)
                out += part.count * width
        return work

    def _compute_rows(self, tensor: TensorPlan, piece: Piece, sft_first: int | None, out: int) -> Work:
        base = self._read("dpo", self._plan.base, tensor.base, piece, piece.first)
        read = piece.count * DTYPE_BYTES[tensor.base.dtype]
        kept = sft_first is None or tensor.sft is None
        if kept and tensor.dtype == tensor.base.dtype:
            ctypes.memmove(out, base, read)
            return Work(read, 0)
        sft, sft_dtype = base, tensor.base.dtype
        if tensor.sft is not None and sft_first is not None:
            sft_dtype = tensor.sft.dtype
            sft = self._read("sft", self._plan.sft, tensor.sft, piece, sft_first)
            read += piece.count * DTYPE_BYTES[sft_dtype]
        options = self._plan.options
        rule = Rule(tensor.base.dtype, sft_dtype, tensor.dtype, options.rounding)
        statistics = _kernel(rule).compute_runs(
            base, sft, out, piece.count, alpha=0.0 if kept else self._alpha * tensor.multiplier,
            key=random_key(options.seed, tensor.random_name), first=piece.first,
            run=piece.run if piece.rows > 1 else piece.count, pitch=piece.pitch,
        )  # fmt: skip
        if not kept:
            refuse_broken(tensor.name, [statistics], self._alpha)
        return Work(read, piece.count)

    def _read(self, use: str, parent: Checkpoint, tensor: Tensor, piece: Piece, first: int) -> int:
        """Address of a piece's elements of one parent, one after the other: where the file is mapped, or a copy."""
        width = DTYPE_BYTES[tensor.dtype]
        data = self.slices._files.data(parent, tensor.file)
        start = tensor.start + first * width
        if piece.rows == 1 and (data.ctypes.data + start) % width == 0:
            return int(data.ctypes.data) + start
        scratch = self.slices._scratch(use, piece.count, width)
        _gather(data[tensor.start : tensor.start + tensor.nbytes], piece, first, scratch)
        return int(scratch.ctypes.data)


def _gather(data: Words, piece: Piece, first: int, out: Words) -> None:
    """Copy the rows of a piece, which begins at element `first` of a tensor's bytes, one after the other into `out`."""
    width = out.dtype.itemsize
    elements = data[first * width : (first + (piece.rows - 1) * piece.pitch + piece.run) * width].view(
        out.dtype
    )
    strides = (piece.pitch * width, width)
    rows = np.lib.stride_tricks.as_strided(elements, (piece.rows, piece.run), strides, writeable=False)
    np.copyto(out.reshape(piece.rows, piece.run), rows)


def _whole_tensors(shards: Sequence[ShardPlan], made: Words) -> Iterator[tuple[str, Words]]:
    """Names and bytes of the tensors that are complete among the first bytes of the shards' files."""
    for shard in shards:
        made = made[len(shard.header) :]
        for tensor in shard.tensors:
            size = out_bytes(tensor)
            if size > len(made):
                return
            yield tensor.name, made[:size]
            made = made[size:]


@dataclass(frozen=True)
class Pending:
    """Parameters that are being filled."""

    slices: Slices
    futures: Sequence[Future[Work]]

    def wait(self) -> None:
        """Wait until they are filled.

        Raises:
            ArithmeticFault: if the result holds NaN or infinities.
        """
        try:
            for future in self.futures:
                self.slices.work += future.result()
        finally:
            self.stop()

    def stop(self) -> None:
        """Begin no more pieces, and wait for those begun: nothing is written afterwards."""
        for future in self.futures:
            future.cancel()
        wait(self.futures)


class _MappedFiles:
    """The weight files of both parents, mapped into memory.

    A file that is cut short while it is read ends the process (SIGBUS), as for every program that maps files; the replica is then
    replaced. One that is replaced or rewritten is noticed before and after each use.
    """

    def __init__(self, parents: Sequence[Checkpoint]) -> None:
        self._parents = parents
        self._maps: dict[tuple[str, str], mmap.mmap] = {}
        self._data: dict[tuple[str, str], Words] = {}
        for parent in parents:
            for name in {tensor.file for tensor in parent.tensors.values()}:
                path = open_store(parent.uri).local_path
                assert path is not None, parent.uri
                with (path / name).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._maps[parent.uri, name] = mapped
                self._data[parent.uri, name] = np.frombuffer(mapped, np.uint8)
        self.check()

    def data(self, parent: Checkpoint, file: str) -> Words:
        """The bytes of a file."""
        return self._data[parent.uri, file]

    def check(self) -> None:
        """Check that the files are those that were planned.

        Raises:
            InputChanged: if one is not.
        """
        for parent in self._parents:
            store = open_store(parent.uri)
            for name in {tensor.file for tensor in parent.tensors.values()}:
                if store.stat(name).etag != parent.files[name].etag:
                    raise InputChanged(f"{parent.uri}/{name} was replaced since it was planned; plan again")

    def close(self) -> None:
        self._data.clear()
        for mapped in self._maps.values():
            mapped.close()


def _matched(tensor: TensorPlan, first: int, count: int) -> Iterator[tuple[Piece, int | None]]:
    """Parts of consecutive elements whose rows have consecutive partners in sft: each part, and its first element there."""
    width = tensor.base.numel // tensor.shape[0]
    begins = [run.dpo_first for run in tensor.runs]
    while count:
        run = tensor.runs[bisect_right(begins, first // width) - 1]
        part = min(count, (run.dpo_first + run.count) * width - first)
        partner = None if run.sft_first is None else first + (run.sft_first - run.dpo_first) * width
        yield Piece(first, 1, part, 0, 0, ()), partner
        first, count = first + part, count - part


def _kernel(rule: Rule) -> CpuKernel:
    kernel = load_kernel(rule, "cpu")
    assert isinstance(kernel, CpuKernel)
    return kernel


def _strided(tensor: torch.Tensor, offset: int, axes: Sequence[Axis]) -> torch.Tensor:
    sizes, strides = [axis.size for axis in axes], [axis.target for axis in axes]
    return torch.as_strided(tensor, sizes, strides, int(tensor.storage_offset()) + offset)

"""The weights of a pair as one worker of an engine holds them: it reads and computes only its slices of both parents.

Rows of a tensor are one stretch of a file. Columns, which row-parallel layers take, are short runs, a few kilobytes apart; a call of
the operating system for each would cost more than the arithmetic, and whole rows as many bytes as without slices. So parents are read
where they lie in memory: where their files are mapped, or in memory of this process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch

from expo_ray.arithmetic.cpu.kernel import CpuKernel
from expo_ray.arithmetic.kernels import load_kernel
from expo_ray.arithmetic.rule import Rule, random_key
from expo_ray.arithmetic.sums import refuse_broken
from expo_ray.checkpoint.tensors import DTYPE_BYTES
from expo_ray.config import RoundingName
from expo_ray.extrapolation.layout import ShardPlan, out_bytes
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import Step, stepped
from expo_ray.serving.held_parents import HeldParents, bytes_at
from expo_ray.serving.index_map import Axis, Fill, IndexMap
from expo_ray.serving.mapped_parents import MappedParents, ParentElements, Words, gather
from expo_ray.serving.pieces import PIECE, Part, Piece, parts_of, pieces_of
from expo_ray.serving.weights import TORCH_DTYPES

Pieces = Mapping[str, Sequence[tuple[str, Sequence[Piece]]]]
NOTHING: Words = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True)
class Work:
    """What was done: bytes of both parents that were read, and elements that were computed."""

    bytes_read: int = 0
    elements: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes_read + other.bytes_read, self.elements + other.elements)


class Slices:
    """Computes the parameters of one worker at any step.

    Args:
        plan: whose parents are on this node, as files; no adapter is merged in it.
        index_map: without an obstacle.
        threads: that compute.

    Attributes:
        mapped: the files of both parents.
        parents: their elements, in the files until `hold` is called.
        pieces: of each parameter: names of tensors, and the pieces of them.
        fills: of each parameter that has any.
        work: all that was read and computed so far.

    Raises:
        InputChanged: if a parent is no longer the one that was planned.
    """

    def __init__(self, plan: PairPlan, index_map: IndexMap, threads: int) -> None:
        assert not index_map.obstacle
        self.plan, self.index_map = plan, index_map
        self.mapped = MappedParents(plan)
        self.parents: ParentElements = self.mapped
        self.threads = ThreadPoolExecutor(threads, "slices")
        self.pieces, self._kind = self.cut(PIECE), StepSlices
        self.fills: dict[str, list[Fill]] = {}
        for fill in index_map.fills:
            self.fills.setdefault(fill.parameter, []).append(fill)
        self.work = Work()

    @property
    def in_memory(self) -> bool:
        """True if the parents are in memory, so that a swap reads no file."""
        return isinstance(self.parents, HeldParents)

    def cut(self, most: int) -> Pieces:
        """Pieces of at most `most` elements, as `pieces`."""
        return {
            name: [(copy.tensor, tuple(pieces_of(copy, most))) for copy in copies]
            for name, copies in self.index_map.by_parameter.items()
        }

    def at(self, step: Step, made: Words = NOTHING) -> StepSlices:
        """The same slices at a step.

        Args:
            made: the first bytes of the shards' files at this step, one after another, where they are computed already.

        Raises:
            InputChanged: if a parent is no longer the one that was planned.
        """
        self.check()
        return self._kind(self, stepped(self.plan, step), step.alpha, made)

    def hold(self, parents: HeldParents, pieces: Pieces, kind: type[StepSlices]) -> None:
        """From now on take the parents from memory, which holds the parts of these pieces, and compute as this kind does."""
        self.parents, self.pieces, self._kind = parents, pieces, kind

    def release(self) -> None:
        """From now on take the parents from their files; memory that held them is freed."""
        if isinstance(self.parents, HeldParents):
            self.parents.close()
        self.parents, self.pieces, self._kind = self.mapped, self.cut(PIECE), StepSlices

    def check(self) -> None:
        """Check that the parents are those that were planned.

        Raises:
            InputChanged: if one is not.
        """
        self.mapped.check()

    def close(self) -> None:
        """End the threads and give the files back."""
        self.threads.shutdown()
        self.release()
        self.mapped.close()


class StepSlices:
    """The parameters of one worker at one step, in the memory of the CPU.

    Attributes:
        on_gpu: whether they are filled in the memory of a GPU.
    """

    on_gpu = False

    def __init__(self, slices: Slices, plan: PairPlan, alpha: float, made: Words = NOTHING) -> None:
        self.slices, self._plan, self._alpha = slices, plan, alpha
        self._tensors = tensors_of(plan)
        self._made = dict(_whole_tensors(plan.shards, made)) if len(made) else {}

    def begin(self, outs: Mapping[str, torch.Tensor]) -> Pending:
        """Begin to fill parameters, by name: contiguous tensors of the parameter's shape and any dtype.

        Values are rounded once more if that dtype does not hold them, as the engine's own loader does.
        """
        futures: list[Future[Work]] = []
        for name, out in outs.items():
            assert out.is_contiguous(), name
            assert out.device.type == "cpu", name
            for fill in self.slices.fills.get(name, ()):
                strided(out, fill.target, fill.axes).fill_(fill.value)
            for tensor, pieces in self.slices.pieces[name]:
                planned = self._tensors[tensor]
                futures += [
                    self.slices.threads.submit(self._compute, planned, piece, out) for piece in pieces
                ]
        return Pending(self.slices, futures)

    def fill(self, outs: Mapping[str, torch.Tensor]) -> None:
        """Fill parameters, see `begin`.

        Raises:
            ArithmeticFault: if the result holds NaN or infinities.
            InputChanged: if a parent is no longer the one that was planned.
        """
        self.begin(outs).wait()
        self.finish()

    def finish(self) -> None:
        """Check what was filled, once all of it is.

        Raises:
            ArithmeticFault: if the result holds NaN or infinities.
            InputChanged: if a parent is no longer the one that was planned.
        """
        self.slices.check()

    def _compute(self, tensor: TensorPlan, piece: Piece, out: torch.Tensor) -> Work:
        """Compute a piece into its place in `out`."""
        dtype, width = TORCH_DTYPES[tensor.dtype], DTYPE_BYTES[tensor.dtype]
        if piece.is_dense and out.dtype == dtype:
            return self._compute_into(tensor, piece, out.data_ptr() + piece.target * width)
        scratch = self.slices.mapped.scratch("out", piece.count, width)
        work = self._compute_into(tensor, piece, scratch.ctypes.data)
        values = torch.from_numpy(scratch.view(np.uint8)).view(dtype)
        place_taken(values, piece, out)
        return work

    def _compute_into(self, tensor: TensorPlan, piece: Piece, out: int) -> Work:
        """Compute all elements of a piece, one after the other from the address `out` on, or copy what is made already."""
        width = DTYPE_BYTES[tensor.dtype]
        if tensor.name in self._made:
            target = bytes_at(out, piece.count * width).view(f"V{width}")
            gather(self._made[tensor.name], piece, piece.first, target)
            return Work()
        work = Work()
        for part in parts_of(tensor, piece):
            work += self._compute_part(tensor, part, out + part.offset * width)
        return work

    def _compute_part(self, tensor: TensorPlan, part: Part, out: int) -> Work:
        base = self.slices.parents.address("dpo", tensor, part)
        read = part.count * DTYPE_BYTES[tensor.base.dtype]
        kept = part.sft_first is None
        if kept and tensor.dtype == tensor.base.dtype:
            ctypes.memmove(out, base, read)
            return Work(read, 0)
        sft = base
        if tensor.sft is not None and not kept:
            sft = self.slices.parents.address("sft", tensor, part)
            read += part.count * DTYPE_BYTES[tensor.sft.dtype]
        rule = rule_of(tensor, part, self._plan.options.rounding)
        statistics = _kernel(rule).compute_runs(
            base, sft, out, part.count, alpha=0.0 if kept else self._alpha * tensor.multiplier,
            key=random_key(self._plan.options.seed, tensor.random_name), first=part.first,
            run=part.run if part.rows > 1 else part.count, pitch=part.pitch,
        )  # fmt: skip
        if not kept:
            refuse_broken(tensor.name, [statistics], self._alpha)
        return Work(read, part.count)


def tensors_of(plan: PairPlan) -> dict[str, TensorPlan]:
    """All tensors of a plan, by name."""
    return {tensor.name: tensor for shard in plan.shards for tensor in shard.tensors}


def rule_of(tensor: TensorPlan, part: Part, rounding: RoundingName) -> Rule:
    """The rule that computes a part; one without a partner in sft is rounded alone, with itself as sft."""
    sft = tensor.base if tensor.sft is None or part.sft_first is None else tensor.sft
    return Rule(tensor.base.dtype, sft.dtype, tensor.dtype, rounding)


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


def _kernel(rule: Rule) -> CpuKernel:
    kernel = load_kernel(rule, "cpu")
    assert isinstance(kernel, CpuKernel)
    return kernel


def place_taken(values: torch.Tensor, piece: Piece, out: torch.Tensor) -> None:
    """Copy the elements of a computed piece that a parameter takes into their places in it."""
    sizes, strides = [axis.size for axis in piece.taken], [axis.source for axis in piece.taken]
    strided(out, piece.target, piece.taken).copy_(torch.as_strided(values, sizes, strides))


def strided(tensor: torch.Tensor, offset: int, axes: Sequence[Axis]) -> torch.Tensor:
    """The elements of a parameter that axes reach from the index `offset` on."""
    sizes, strides = [axis.size for axis in axes], [axis.target for axis in axes]
    return torch.as_strided(tensor, sizes, strides, int(tensor.storage_offset()) + offset)

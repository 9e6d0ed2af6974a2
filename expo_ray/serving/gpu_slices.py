"""The parameters of one worker computed on its GPU, into the engine's own memory, from parents held there or in pinned memory.

Needs Triton. Under its interpreter the same runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from expo_ray.arithmetic.rule import random_key
from expo_ray.checkpoint.tensors import DTYPE_BYTES
from expo_ray.config import format_alpha
from expo_ray.errors import ArithmeticFault
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.serving.held_parents import HeldParents
from expo_ray.serving.mapped_parents import Words
from expo_ray.serving.pieces import Part, Piece, parts_of
from expo_ray.serving.slices import NOTHING, Pending, Slices, StepSlices, Work, place_taken, strided
from expo_ray.serving.weights import TORCH_DTYPES

# A launch costs tens of microseconds, so a piece is all that a parameter takes of a tensor; 2^31 would overflow its indices.
GPU_PIECE = 1 << 30


class GpuStepSlices(StepSlices):
    """The parameters of one worker at one step, in the memory of its GPU.

    Work is queued on the current stream: what is queued after `begin` finds the parameters filled.
    """

    on_gpu = True

    def __init__(self, slices: Slices, plan: PairPlan, alpha: float, made: Words = NOTHING) -> None:
        super().__init__(slices, plan, alpha, made)
        assert isinstance(slices.parents, HeldParents)
        self._held: HeldParents = slices.parents
        self._numbers = {name: number for number, name in enumerate(self._tensors)}
        self._broken: torch.Tensor | None = None

    def begin(self, outs: Mapping[str, torch.Tensor]) -> Pending:
        for name, out in outs.items():
            assert out.is_contiguous(), name
            if self._broken is None:
                # One more than there are tensors: for elements that are kept, which the CPU does not count either.
                self._broken = torch.zeros(len(self._numbers) + 1, dtype=torch.int64, device=out.device)
            for fill in self.slices.fills.get(name, ()):
                strided(out, fill.target, fill.axes).fill_(fill.value)
            for tensor, pieces in self.slices.pieces[name]:
                for piece in pieces:
                    self._queue(self._tensors[tensor], piece, out, self._broken)
        return Pending(self.slices, ())

    def finish(self) -> None:
        super().finish()
        counts = [] if self._broken is None else self._broken[:-1].tolist()
        for name, count in zip(self._numbers, counts, strict=False):
            if count:
                raise ArithmeticFault(
                    f"{name} at alpha {format_alpha(self._alpha)}: {count} NaN, infinite or overflowing elements; choose a smaller "
                    "alpha, or repair the parents"
                )

    def _queue(self, tensor: TensorPlan, piece: Piece, out: torch.Tensor, broken: torch.Tensor) -> None:
        dtype = TORCH_DTYPES[tensor.dtype]
        dense = piece.is_dense and out.dtype == dtype
        computed = (
            out.view(-1)[piece.target : piece.target + piece.count]
            if dense
            else torch.empty(piece.count, dtype=dtype, device=out.device)
        )
        for part in parts_of(tensor, piece):
            self._queue_part(tensor, part, computed[part.offset : part.offset + part.count], broken)
        if not dense:
            place_taken(computed, piece, out)

    def _queue_part(self, tensor: TensorPlan, part: Part, out: torch.Tensor, broken: torch.Tensor) -> None:
        from expo_ray.arithmetic.gpu.launch import extrapolate_into  # needs Triton

        base = self._held.elements("dpo", tensor, part).view(TORCH_DTYPES[tensor.base.dtype])
        read = part.count * DTYPE_BYTES[tensor.base.dtype]
        kept = part.sft_first is None
        if kept and tensor.dtype == tensor.base.dtype:
            out.copy_(base, non_blocking=True)
            self.slices.work += Work(read, 0)
            return
        sft, number = base, -1
        if tensor.sft is not None and not kept:
            sft = self._held.elements("sft", tensor, part).view(TORCH_DTYPES[tensor.sft.dtype])
            read += part.count * DTYPE_BYTES[tensor.sft.dtype]
            number = self._numbers[tensor.name]
        extrapolate_into(
            out, base, sft, 0.0 if kept else self._alpha * tensor.multiplier, broken=broken[number:][:1],
            rounding=self._plan.options.rounding, key=random_key(self._plan.options.seed, tensor.random_name),
            first=part.first, columns=part.run, row_stride=part.pitch if part.rows > 1 else part.run,
        )  # fmt: skip
        self.slices.work += Work(read, part.count)

"""The weights of a pair at one alpha, computed tensor by tensor and never written to a disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from expo_ray.arithmetic.sums import refuse_broken
from expo_ray.checkpoint.vocabulary import RowRun
from expo_ray.extrapolation.layout import ShardPlan, out_bytes
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.stream import compute_pages

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_NOTHING: Bytes = np.empty(0, np.uint8)


def extrapolated(plan: PairPlan, alpha: float, made: Bytes = _NOTHING) -> Iterator[tuple[str, torch.Tensor]]:
    """Compute every tensor at `alpha`, one after another: names and weights, with the bytes that the published shards have.

    Args:
        made: the first bytes of the shards' files, one after another, computed already; tensors that are whole are views of it.

    Raises:
        ArithmeticFault: if the result holds NaN or infinities.
        InputChanged: if a parent is no longer the one that was planned.
        StorageError: if a parent cannot be read.
    """
    for shard in plan.shards:
        made, missing = made[len(shard.header) :], list(shard.tensors)
        while missing and out_bytes(missing[0]) <= len(made):
            tensor = missing.pop(0)
            size = out_bytes(tensor)
            yield tensor.name, _shaped(torch.from_numpy(made[:size]), tensor)
            made = made[size:]
        if missing:
            made = _NOTHING
            rest = replace(shard, tensors=tuple(missing))
            yield from _tensors_of(replace(plan, shards=(rest,)), alpha)


def _tensors_of(plan: PairPlan, alpha: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Compute the tensors of the plan's first shard."""
    file = _File(plan, alpha)
    file.read_into(np.empty(len(plan.shards[0].header), np.uint8))
    for tensor in plan.shards[0].tensors:
        # New memory for each tensor: the loader keeps tensors until all that a layer fuses have come.
        shape = _shape_of(tensor)
        data = torch.empty(
            math.prod(shape) * TORCH_DTYPES[tensor.dtype].itemsize, dtype=torch.uint8, device="cpu"
        )
        file.read_into(data.numpy())
        yield tensor.name, _shaped(data, tensor)


def _shape_of(tensor: TensorPlan) -> tuple[int, ...]:
    return (sum(run.count for run in tensor.runs), *tensor.shape[1:]) if tensor.runs else tensor.shape


def _shaped(data: torch.Tensor, tensor: TensorPlan) -> torch.Tensor:
    return data.view(TORCH_DTYPES[tensor.dtype]).reshape(_shape_of(tensor))


class _File:
    """The bytes of the file of a plan's first shard as they are computed, front to back."""

    def __init__(self, plan: PairPlan, alpha: float) -> None:
        self._pages, self._alpha = compute_pages(plan, 0, [alpha], "cpu"), alpha
        self._page: Bytes = _NOTHING

    def read_into(self, out: Bytes) -> None:
        """Fill `out` with the next bytes.

        Raises:
            ArithmeticFault: if they hold a value that no model can have.
        """
        while len(out):
            if not len(self._page):
                page = next(self._pages)
                for name, statistics in page.statistics:
                    refuse_broken(name, statistics, self._alpha)
                self._page = np.frombuffer(page.outs[0], np.uint8)
            count = min(len(out), len(self._page))
            out[:count] = self._page[:count]
            out, self._page = out[count:], self._page[count:]


def rows_of(plan: PairPlan, rows: Mapping[str, Sequence[int]], alpha: float) -> dict[str, torch.Tensor]:
    """Compute some rows of some tensors at `alpha`, each (rows, the tensor's other dimensions), by name."""
    tensors = [
        replace(tensor, runs=tuple(RowRun(row, _partner(tensor, row), 1) for row in rows[tensor.name]))
        for shard in plan.shards
        for tensor in shard.tensors
        if tensor.name in rows
    ]
    alone = replace(plan, shards=(ShardPlan("", tuple(tensors), 0),))
    return dict(_tensors_of(alone, alpha))


def _partner(tensor: TensorPlan, row: int) -> int | None:
    """The row of sft that goes with a row of dpo."""
    for run in tensor.runs:
        if run.dpo_first <= row < run.dpo_first + run.count:
            return None if run.sft_first is None else run.sft_first + row - run.dpo_first
    return row

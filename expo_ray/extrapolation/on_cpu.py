"""The compiled arithmetic as a `Kernel`: buffers in, statistics out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from expo_ray.checkpoint.tensors import DTYPE_BYTES
from expo_ray.extrapolation import fused
from expo_ray.extrapolation.arithmetic import Rule, compute_dtype, statistics_from_sums
from expo_ray.extrapolation.statistics import TensorStatistics

KINDS = {"BF16": fused.BF16, "F16": fused.F16, "F32": fused.F32, "F64": fused.F64}
ROUNDINGS = {"nearest": fused.NEAREST, "stochastic": fused.STOCHASTIC, "reference": fused.REFERENCE}


class CpuKernel:
    """`Kernel` of one rule."""

    def __init__(self, rule: Rule) -> None:
        self._dtypes = (rule.dpo_dtype, rule.sft_dtype, rule.out_dtype)
        self._kinds = tuple(KINDS[dtype] for dtype in self._dtypes)
        self._rounding = ROUNDINGS[rule.rounding]
        self._real = np.float32 if compute_dtype(rule) == "F32" else np.float64
        self._run = fused.kernel(compute_dtype(rule))

    def __call__(
        self,
        dpo: memoryview,
        sft: memoryview,
        outs: Sequence[memoryview],
        *,
        alphas: Sequence[float],
        key: int,
        first: int,
    ) -> list[TensorStatistics]:
        dpo_size, sft_size, out_size = (DTYPE_BYTES[dtype] for dtype in self._dtypes)
        count = dpo.nbytes // dpo_size
        assert [sft.nbytes, *(out.nbytes for out in outs)] == [count * sft_size] + [count * out_size] * len(
            alphas
        )
        parents = (_aligned(dpo, dpo_size), _aligned(sft, sft_size))
        results = [_aligned(out, out_size) for out in outs]
        addresses = np.array([result.ctypes.data for result in results], np.int64)
        shared, per_alpha = np.zeros(5), np.zeros((len(outs), 2))
        self._run(
            parents[0].ctypes.data, parents[1].ctypes.data, addresses, self._kinds, self._rounding,
            np.array(alphas, self._real), key, first, count, shared, per_alpha,
        )  # fmt: skip
        for out, result in zip(outs, results, strict=True):
            if result.flags.owndata:
                np.frombuffer(out, np.uint8)[:] = result
        return statistics_from_sums(count, shared, per_alpha)


def _aligned(buffer: memoryview, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    view = np.frombuffer(buffer, np.uint8)
    return view.copy() if view.ctypes.data % size else view

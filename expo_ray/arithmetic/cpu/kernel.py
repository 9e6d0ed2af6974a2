"""The compiled arithmetic as a `Kernel`: buffers in, statistics out."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

from expo_ray.arithmetic.cpu.machine_code import load_machine_code
from expo_ray.arithmetic.rule import ROUNDINGS, Rule
from expo_ray.arithmetic.sums import TensorStatistics, statistics_from_sums
from expo_ray.checkpoint.tensors import DTYPE_BYTES

# The constants of `words` and `blocks`, which are not imported here: numba would come with them. A test compares the two.
DTYPE_CODES = {dtype: code for code, dtype in enumerate(("BF16", "F16", "F32", "F64"))}
ROUNDING_CODES = {rounding: code for code, rounding in enumerate(ROUNDINGS)}
SCRATCH_BYTES = 58 * 2048

_threads = threading.local()


class CpuKernel:
    """`Kernel` of one rule."""

    def __init__(self, rule: Rule) -> None:
        self._dtypes = (rule.dpo_dtype, rule.sft_dtype, rule.out_dtype)
        self._codes = (*(DTYPE_CODES[dtype] for dtype in self._dtypes), ROUNDING_CODES[rule.rounding])
        self._real: Any = ctypes.c_float if rule.compute_dtype == "F32" else ctypes.c_double
        self._run = load_machine_code(rule.compute_dtype)

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
        count, num = dpo.nbytes // dpo_size, len(outs)
        assert sft.nbytes == count * sft_size
        assert [out.nbytes for out in outs] == [count * out_size] * num
        parents = (_aligned(dpo, dpo_size), _aligned(sft, sft_size))
        results = [_aligned(out, out_size) for out in outs]
        statistics = self._call(
            _address(parents[0]), _address(parents[1]), list(map(_address, results)), alphas,
            key=key, first=first, count=count, run=count, pitch=0,
        )  # fmt: skip
        for out, result in zip(outs, results, strict=True):
            if result is not out:
                out[:] = result
        return statistics

    def compute_runs(
        self,
        dpo: int,
        sft: int,
        out: int,
        count: int,
        *,
        alpha: float,
        key: int,
        first: int,
        run: int,
        pitch: int,
    ) -> TensorStatistics:
        """Extrapolate runs of elements that lie one after the other in memory, and `pitch` elements apart in their tensor.

        Args:
            dpo, sft, out: addresses, multiples of an element's size.
            count: number of elements of all runs together.
            first: index within the tensor of the first run's first element.
            run: number of elements of each run; `count` for a single one.

        Returns:
            Statistics. Their sums are added in an order of their own where there are several runs.
        """
        (statistics,) = self._call(
            dpo, sft, [out], [alpha], key=key, first=first, count=count, run=run, pitch=pitch
        )
        return statistics

    def _call(
        self, dpo: int, sft: int, outs: Sequence[int], alphas: Sequence[float], *,
        key: int, first: int, count: int, run: int, pitch: int,
    ) -> list[TensorStatistics]:  # fmt: skip
        num = len(outs)
        shared, per_alpha = (ctypes.c_double * 5)(), (ctypes.c_double * (3 * num))()
        addresses, factors = (ctypes.c_int64 * num)(*outs), (self._real * num)(*alphas)
        self._run(
            dpo, sft, ctypes.addressof(addresses), *self._codes,
            ctypes.addressof(factors), num, _signed(key), first, count,
            ctypes.addressof(shared), ctypes.addressof(per_alpha), _scratch(), run, pitch,
        )  # fmt: skip
        return statistics_from_sums(count, shared, [per_alpha[k : k + 2] for k in range(0, 3 * num, 3)])


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer.nbytes else 0


def _aligned(buffer: memoryview, size: int) -> memoryview:
    """The buffer, or a copy of it if its address is no multiple of `size`; ctypes cannot read the address of a read-only one."""
    view = buffer.cast("B")
    if view.readonly or _address(view) % size:
        return memoryview(bytearray(view))
    return buffer


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def _scratch() -> int:
    """Address of this thread's scratch memory."""
    if not hasattr(_threads, "scratch"):
        _threads.scratch = (ctypes.c_int64 * (SCRATCH_BYTES // 8))()
    return ctypes.addressof(_threads.scratch)

"""The compiled arithmetic as a `Kernel`: buffers in, statistics out."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

from expo_ray.arithmetic.cpu import machine_code as compiled
from expo_ray.arithmetic.rule import Rule, compute_dtype, statistics_from_sums
from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.checkpoint.tensors import DTYPE_BYTES

# The constants of `words` and `fused`, which are not imported here: numba would come with them.
KINDS = {dtype: kind for kind, dtype in enumerate(("BF16", "F16", "F32", "F64"))}
ROUNDINGS = {rounding: kind for kind, rounding in enumerate(("nearest", "stochastic", "reference"))}
SCRATCH_BYTES = 53 * 2048

_threads = threading.local()


class CpuKernel:
    """`Kernel` of one rule."""

    def __init__(self, rule: Rule) -> None:
        self._dtypes = (rule.dpo_dtype, rule.sft_dtype, rule.out_dtype)
        self._codes = (*(KINDS[dtype] for dtype in self._dtypes), ROUNDINGS[rule.rounding])
        self._real: Any = ctypes.c_float if compute_dtype(rule) == "F32" else ctypes.c_double
        self._run = compiled.kernel(compute_dtype(rule))

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
        shared, per_alpha = (ctypes.c_double * 5)(), (ctypes.c_double * (3 * num))()
        parents = (_aligned(dpo, dpo_size), _aligned(sft, sft_size))
        results = [_aligned(out, out_size) for out in outs]
        addresses, factors = (ctypes.c_int64 * num)(*map(_address, results)), (self._real * num)(*alphas)
        self._run(
            *map(_address, parents), ctypes.addressof(addresses), *self._codes,
            ctypes.addressof(factors), num, _signed(key), first, count,
            ctypes.addressof(shared), ctypes.addressof(per_alpha), _scratch(),
        )  # fmt: skip
        for out, result in zip(outs, results, strict=True):
            if result is not out:
                out[:] = result
        return statistics_from_sums(count, shared, [per_alpha[k : k + 2] for k in range(0, 3 * num, 3)])


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer.nbytes else 0


def _aligned(buffer: memoryview, size: int) -> memoryview:
    """The buffer as bytes, or a copy if its address is no multiple of `size`; read-only ones do not tell theirs."""
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

"""The arithmetic on the CPU: compiled loops over blocks that stay in the first-level cache, without the GIL.

A block is 2048 elements, aligned to the tensor's element index. Each step is a plain loop that LLVM turns into vector
code; integers are cast explicitly because numba would widen 32 bits to 64 and halve the speed. Nothing here may be
compiled with `fastmath`: weights and sums are the same on every machine only without it.

Everything compiled stays in this one file: numba's cache notices a change of the kernel's own file only.
"""
# ruff: noqa: PLR0917 - compiled functions have no keyword-only parameters

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import carray, float32, float64, int64, njit, types, uint64
from numba.extending import intrinsic

BLOCK = 2048
# Literal, like all constants here: they are compiled into the cached code.
BF16, F16, F32, F64 = range(4)
NEAREST, STOCHASTIC, REFERENCE = range(3)

Function = TypeVar("Function", bound=Callable[..., Any])
Scalar = Any  # a numba scalar
Array = Any  # a numba array; of blocks, float32 or float64 as `compute_dtype` says


def _compiled(function: Function) -> Function:
    # Without the wrappers, which only Python callers need, the whole compiles a tenth faster.
    decorated: Function = njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return decorated


def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


# Addresses instead of arrays: numba would compile again for read-only buffers and for every number of outputs.
pointer: Callable[[Scalar], Any] = intrinsic(_pointer)


@_compiled
def element_bytes(kind: Scalar) -> Scalar:
    """Size of a dtype."""
    return 2 if kind <= F16 else 4 if kind == F32 else 8


@_compiled
def from_bf16(word: Scalar) -> Scalar:
    """BF16 is the upper half of a float32."""
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@_compiled
def from_f16(word: Scalar) -> Scalar:
    """Re-bias the exponent. A subnormal becomes `(2^-14 + value) - 2^-14`: exact, and free of slow subnormal inputs."""
    shifted = np.uint32(np.uint32(word & np.uint16(0x7FFF)) << np.uint32(13))
    raised = np.uint32(shifted + np.uint32(113 << 23)).view(np.float32)
    subnormal = np.float32(raised - np.float32(2.0**-14)).view(np.uint32)
    normal = np.uint32(shifted + np.uint32(112 << 23))
    special = np.uint32(shifted + np.uint32(224 << 23))
    magnitude = subnormal if shifted < np.uint32(1 << 23) else normal
    magnitude = special if shifted >= np.uint32(31 << 23) else magnitude
    return np.uint32(magnitude | (np.uint32(word & np.uint16(0x8000)) << np.uint32(16))).view(np.float32)


@_compiled
def widen(address: Scalar, kind: Scalar, out: Array) -> None:
    """Read `out.size` elements of dtype `kind`; exact, as `out`'s type holds every dtype it meets."""
    count = out.size
    if kind == BF16:
        words = carray(pointer(address), count, np.uint16)
        for i in range(count):
            out[i] = from_bf16(words[i])
    elif kind == F16:
        words = carray(pointer(address), count, np.uint16)
        for i in range(count):
            out[i] = from_f16(words[i])
    elif kind == F32:
        singles = carray(pointer(address), count, np.float32)
        for i in range(count):
            out[i] = singles[i]
    else:
        doubles = carray(pointer(address), count, np.float64)
        for i in range(count):
            out[i] = doubles[i]


@_compiled
def nearest_bf16(value: Scalar) -> Scalar:
    """Ties to even: a carry out of the lower half rounds up, into the exponent if need be."""
    pattern = np.float32(value).view(np.uint32)
    below_half = np.uint32(np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1)))
    word = np.uint32(pattern + below_half) >> np.uint32(16)
    return np.uint16(np.uint32(0x7FC0) if np.isnan(value) else word)


@_compiled
def stochastic_bf16(value: Scalar, random16: Scalar) -> Scalar:
    """The lower half carries with a probability of itself in 2^16."""
    pattern = np.float32(value).view(np.uint32)
    word = np.uint32(pattern + np.uint32(random16)) >> np.uint32(16)
    return np.uint16(np.uint32(0x7FC0) if np.isnan(value) else word)


@_compiled
def to_16_bits(
    value: Scalar, random32: Scalar, nearest: Scalar, mantissa: Scalar, least: Scalar, infinity: Scalar
) -> Scalar:
    """Round a float64 once to a 16-bit format, by integers: numpy and torch go through float32 and round twice.

    The magnitude is shifted until 2^32 is one unit in the target's last place, subnormals included. What is added below
    that unit decides the direction, and a carry runs into the exponent as it should.

    Args:
        mantissa: stored bits of the target. least: float64's biased exponent of the target's least normal number.
        infinity: the target's word for it.
    """
    pattern = np.float64(value).view(np.uint64)
    magnitude = pattern & np.uint64(0x7FFFFFFFFFFFFFFF)
    below = max(least - np.int64(magnitude >> np.uint64(52)), 0)
    normal = magnitude - (np.uint64(least - 1) << np.uint64(52))
    subnormal = (magnitude & np.uint64(0xFFFFFFFFFFFFF)) | np.uint64(1 << 52)
    aligned = normal if below == 0 else subnormal
    drop = np.uint64(min(below + (20 - mantissa), 63))
    fixed = aligned >> drop
    addend = np.uint64(random32)
    if nearest:
        fixed |= np.uint64((fixed << drop) != aligned)
        addend = np.uint64(0x7FFFFFFF) + ((fixed >> np.uint64(32)) & np.uint64(1))
    word = min((fixed + addend) >> np.uint64(32), np.uint64(infinity))
    word |= (pattern >> np.uint64(48)) & np.uint64(0x8000)
    return np.uint16(np.uint64(infinity | (1 << (mantissa - 1))) if np.isnan(value) else word)


@_compiled
def narrow(values: Array, kind: Scalar, stochastic: Scalar, bits: Scalar, address: Scalar) -> None:
    """Write `values` as words of dtype `kind`, every NaN as the canonical one; `bits` is the address of their random bits."""
    count = values.size
    if kind == F64:
        quads = carray(pointer(address), count, np.uint64)
        for i in range(count):
            pattern = np.float64(values[i]).view(np.uint64)
            quads[i] = np.uint64(0x7FF8 << 48) if np.isnan(values[i]) else pattern
    elif kind == F32:
        pairs = carray(pointer(address), count, np.uint32)
        for i in range(count):
            half = np.float32(values[i]).view(np.uint32)
            pairs[i] = np.uint32(0x7FC0 << 16) if np.isnan(values[i]) else half
    else:
        words = carray(pointer(address), count, np.uint16)
        narrow_to_16_bits(values, kind, stochastic, bits, words)


@_compiled
def narrow_to_16_bits(values: Array, kind: Scalar, stochastic: Scalar, bits: Scalar, words: Array) -> None:
    """`narrow` for the dtypes that rounding touches."""
    count = values.size
    mantissa, least, infinity = (7, 1023 - 126, 0x7F80) if kind == BF16 else (10, 1023 - 14, 0x7C00)
    if bits_per_element(kind, values.itemsize) == 16:
        if stochastic:
            random16 = carray(pointer(bits), count, np.uint16)
            for i in range(count):
                words[i] = stochastic_bf16(values[i], random16[i])
        else:
            for i in range(count):
                words[i] = nearest_bf16(values[i])
    elif stochastic:
        random32 = carray(pointer(bits), count, np.uint32)
        for i in range(count):
            words[i] = to_16_bits(values[i], random32[i], False, mantissa, least, infinity)
    else:
        for i in range(count):
            words[i] = to_16_bits(values[i], np.uint32(0), True, mantissa, least, infinity)


@_compiled
def bits_per_element(kind: Scalar, compute_bytes: Scalar) -> Scalar:
    """Random bits that rounding takes: 16 decide float32 to BF16 exactly, as 16 bits are dropped; else 32."""
    return 16 if kind == BF16 and compute_bytes == 4 else 32


@_compiled
def random_bits(key: Scalar, first: Scalar, out: Array) -> None:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) of `key + index * golden`, for words `first` and following."""
    for i in range(out.size):
        z = np.uint64(key) + np.uint64(first + i) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = z ^ (z >> np.uint64(31))


@_compiled
def subtract(dpo: Array, sft: Array, delta: Array) -> Scalar:
    """Returns how many elements differ, and how many differences are not finite."""
    changed, odd = np.uint32(0), np.uint32(0)
    for i in range(BLOCK):
        delta[i] = dpo[i] - sft[i]
        changed = np.uint32(changed + np.uint32(delta[i] != 0))
        odd = np.uint32(odd + np.uint32(not (abs(delta[i]) < np.inf)))
    return np.int64(changed), np.int64(odd)


@_compiled
def step(dpo: Array, sft: Array, delta: Array, alpha: Scalar, reference: Scalar, out: Array) -> None:
    """The formula, before it is rounded to the output's dtype."""
    if reference:
        for i in range(BLOCK):
            d = from_bf16(nearest_bf16(dpo[i]))
            s = from_bf16(nearest_bf16(sft[i]))
            difference = from_bf16(nearest_bf16(d - s))
            product = from_bf16(nearest_bf16(np.float32(alpha) * difference))
            out[i] = from_bf16(nearest_bf16(d + product))
    elif alpha == -1:
        for i in range(BLOCK):
            out[i] = sft[i]
    elif alpha == 0:
        for i in range(BLOCK):
            out[i] = dpo[i]
    else:
        for i in range(BLOCK):
            product = alpha * delta[i]
            # -0 + 0 would be +0.
            out[i] = dpo[i] if delta[i] == 0 else dpo[i] + product


@_compiled
def inner_product(a: Array, b: Array, folded: Array) -> Scalar:
    """Sum of `a * b` by folding the upper half onto the lower until one is left: one order on every machine and device.

    Where float32 overflowed or came near its end, the block is summed again in float64 without the terms that are not
    finite.
    """
    half, quarter = BLOCK // 2, BLOCK // 4
    for i in range(quarter):
        j = i + quarter
        folded[i] = (a[i] * b[i] + a[i + half] * b[i + half]) + (a[j] * b[j] + a[j + half] * b[j + half])
    fold(folded, quarter)
    return np.float64(folded[0]) if 1e-20 < abs(folded[0]) < np.inf else careful_inner_product(a, b)


@_compiled
def careful_inner_product(a: Array, b: Array) -> Scalar:
    """In float64, without the terms that are not finite."""
    folded = np.empty(BLOCK, np.float64)
    for i in range(BLOCK):
        term = np.float64(a[i]) * np.float64(b[i])
        folded[i] = term if abs(term) < np.inf else 0.0
    fold(folded, BLOCK)
    return folded[0]


@_compiled
def fold(terms: Array, width: Scalar) -> None:
    """Leave the sum of the first `width` (a power of two) in front."""
    while width > 1:
        width //= 2
        for i in range(width):
            terms[i] += terms[i + width]


@_compiled
def move(out: Array, dpo: Array, sft: Array) -> Scalar:
    """`out -= dpo`; returns how many elements were finite in both parents and not in `out`."""
    overflow = np.uint32(0)
    for i in range(BLOCK):
        lost = (not (abs(out[i]) < np.inf)) & (abs(dpo[i]) < np.inf) & (abs(sft[i]) < np.inf)
        overflow = np.uint32(overflow + np.uint32(lost))
        out[i] -= dpo[i]
    return np.int64(overflow)


@_compiled
def find_twins(
    dpo: Array, sft: Array, dpo_bytes: Array, sft_bytes: Array, same_dtype: Scalar, twins: Array
) -> Scalar:
    """Mark elements that are not finite and the same in both parents: by bits, or by value where the dtypes differ.

    Returns the number of twins, of NaN in either parent, and of infinities in either parent that are no twins.
    """
    num_twins, num_nan, num_inf = 0, 0, 0
    for i in range(dpo.size):
        same = dpo[i] == sft[i]
        if same_dtype:
            same = True
            for j in range(dpo_bytes.shape[1]):
                same &= dpo_bytes[i, j] == sft_bytes[i, j]
        twins[i] = same and not np.isfinite(dpo[i])
        num_twins += twins[i]
        num_nan += np.isnan(dpo[i]) or np.isnan(sft[i])
        num_inf += (np.isinf(dpo[i]) or np.isinf(sft[i])) and not twins[i]
    return num_twins, num_nan, num_inf


@_compiled
def copy_bytes(source: Array, marked: Array, everything: Scalar, out: Array) -> None:
    """Copy the elements (rows of bytes) that are marked, or everything."""
    for i in range(marked.size):
        if marked[i] or everything:
            for j in range(source.shape[1]):
                out[i, j] = source[i, j]


def extrapolate(
    dpo: Scalar, sft: Scalar, outs: Array, kinds: Any, rounding: Scalar, alphas: Array, key: Scalar, first: Scalar,
    count: Scalar, shared: Array, per_alpha: Array,
) -> None:  # fmt: skip
    """All of a chunk.

    Args:
        dpo, sft, outs: addresses.
        kinds: dtype of dpo, sft and outs.
        alphas: of the type to compute in.
        shared: is increased by changed, nan, inf, dpo_square, delta_square.
        per_alpha: each row is increased by overflow, moved_delta.
    """
    d = np.empty(BLOCK, alphas.dtype)
    s, delta, value, folded = np.empty_like(d), np.empty_like(d), np.empty_like(d), np.empty_like(d)
    twins = np.empty(BLOCK, np.bool_)
    bits = np.empty(BLOCK // 2, np.uint64)
    dpo_kind, sft_kind, out_kind = kinds
    dpo_size, sft_size, out_size = element_bytes(dpo_kind), element_bytes(sft_kind), element_bytes(out_kind)
    random_bytes = bits_per_element(out_kind, alphas.itemsize) // 8
    stochastic = rounding == STOCHASTIC and out_size == 2
    done = 0
    while done < count:
        lo = (first + done) % BLOCK
        hi = min(BLOCK, lo + count - done)
        dpo_at, sft_at = dpo + done * dpo_size, sft + done * sft_size
        if hi - lo < BLOCK:
            for i in range(BLOCK):
                d[i] = s[i] = 0
        widen(dpo_at, dpo_kind, d[lo:hi])
        widen(sft_at, sft_kind, s[lo:hi])
        changed, odd = subtract(d, s, delta)
        shared[0] += changed
        shared[3] += inner_product(d, d, folded)
        if changed:  # frozen layers: sums of nothing but zeros would be taken twice
            shared[4] += inner_product(delta, delta, folded)
        dpo_bytes = carray(pointer(dpo_at), (hi - lo, dpo_size), np.uint8)
        if odd:
            sft_bytes = carray(pointer(sft_at), (hi - lo, sft_size), np.uint8)
            same_dtype = dpo_kind == sft_kind
            num_twins, num_nan, num_inf = find_twins(
                d[lo:hi], s[lo:hi], dpo_bytes, sft_bytes, same_dtype, twins[lo:hi]
            )
            shared[0] -= num_twins
            shared[1] += num_nan
            shared[2] += num_inf
        if stochastic:
            random_bits(key, (first + done - lo) * random_bytes // 8, bits[: BLOCK * random_bytes // 8])
        for k in range(alphas.size):
            out_at = outs[k] + done * out_size
            step(d, s, delta, alphas[k], rounding == REFERENCE, value)
            if odd:
                for i in range(lo, hi):
                    value[i] = d[i] if twins[i] else value[i]
            narrow(value[lo:hi], out_kind, stochastic, bits.ctypes.data + lo * random_bytes, out_at)
            if odd and out_kind == dpo_kind:
                out_bytes = carray(pointer(out_at), (hi - lo, out_size), np.uint8)
                copy_bytes(dpo_bytes, twins[lo:hi], alphas[k] == 0 and rounding != REFERENCE, out_bytes)
            widen(out_at, out_kind, value[lo:hi])
            per_alpha[k, 0] += move(value, d, s)
            if changed:
                per_alpha[k, 1] += inner_product(value, delta, folded)
        done += hi - lo


_compiling = threading.Lock()


def kernel(compute: str) -> Callable[..., None]:
    """`extrapolate` for one compute type: compiled, or loaded from numba's cache."""
    with _compiling:  # or each thread that meets the first chunks would compile it
        return _compile(compute)


@functools.cache
def _compile(compute: str) -> Callable[..., None]:
    real = float32 if compute == "F32" else float64
    kinds = types.UniTuple(int64, 3)
    signature = types.void(
        int64, int64, int64[::1], kinds, int64, real[::1], uint64, int64, int64, float64[::1], float64[:, ::1]
    )
    decorated: Callable[..., None]
    try:
        decorated = njit(signature, nogil=True, cache=True)(extrapolate)
    except (RuntimeError, OSError):  # no folder for the cache can be written, or its disk is full
        decorated = njit(signature, nogil=True)(extrapolate)
    return decorated

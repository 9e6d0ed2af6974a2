"""Weights as words: every dtype read exactly, rounded and written, and the random bits.

Integers are cast explicitly because numba would widen 32 bits to 64 and halve the speed.
"""
# ruff: noqa: PLR0917 - compiled functions have no keyword-only parameters

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

# Literals, like all constants of the compiled files: they become part of the machine code, whose cache knows these files only.
BF16, F16, F32, F64 = range(4)

Function = TypeVar("Function", bound=Callable[..., Any])
Scalar = Any  # a numba scalar
Array = Any  # a numba array; of blocks, float32 or float64 as `compute_dtype` says


def compiled(function: Function) -> Function:
    """Compile a piece of a kernel: it allocates nothing, raises nothing, and is compiled without `fastmath`."""
    # Without the wrappers, which only Python callers need, the whole compiles a tenth faster.
    decorated: Function = njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)
    return decorated


OPTIONS: dict[str, Any] = {"error_model": "numpy"}


def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


# Addresses instead of arrays: for numba, read-only buffers and every number of outputs are other types, compiled anew.
pointer: Callable[[Scalar], Any] = intrinsic(_pointer)


@compiled
def element_bytes(kind: Scalar) -> Scalar:
    """Size of a dtype."""
    return 2 if kind <= F16 else 4 if kind == F32 else 8


@compiled
def from_bf16(word: Scalar) -> Scalar:
    """BF16 is the upper half of a float32."""
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@compiled
def from_f16(word: Scalar) -> Scalar:
    """F16 to float32, exactly: mantissa moved from 10 to 23 bits, exponent from bias 15 to bias 127.

    A subnormal is computed as `(2^-14 + value) - 2^-14`, which is exact and needs no subnormal input: those are slow.
    """
    shifted = np.uint32(np.uint32(word & np.uint16(0x7FFF)) << np.uint32(13))
    raised = np.uint32(shifted + np.uint32(113 << 23)).view(np.float32)  # 2^-14 + value
    subnormal = np.float32(raised - np.float32(2.0**-14)).view(np.uint32)
    normal = np.uint32(shifted + np.uint32(112 << 23))  # 127 - 15
    special = np.uint32(shifted + np.uint32(224 << 23))  # infinity and NaN: exponent 31 becomes 255
    magnitude = subnormal if shifted < np.uint32(1 << 23) else normal
    magnitude = special if shifted >= np.uint32(31 << 23) else magnitude
    return np.uint32(magnitude | (np.uint32(word & np.uint16(0x8000)) << np.uint32(16))).view(np.float32)


@compiled
def widen(address: Scalar, kind: Scalar, out: Array) -> None:
    """Read `out.size` elements of dtype `kind` into `out`; exact, as `out`'s type holds every dtype it meets."""
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


@compiled
def nearest_bf16(value: Scalar) -> Scalar:
    """Float32 to BF16, ties to even.

    BF16 is the upper half of the word. Adding just under half of its last place (0x7FFF), and one more if it is odd, carries into
    it exactly when the value is to be rounded up; a carry out of the mantissa raises the exponent, up to infinity.
    """
    pattern = np.float32(value).view(np.uint32)
    below_half = np.uint32(np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1)))
    word = np.uint32(pattern + below_half) >> np.uint32(16)
    return np.uint16(np.uint32(0x7FC0) if np.isnan(value) else word)


@compiled
def stochastic_bf16(value: Scalar, random16: Scalar) -> Scalar:
    """Float32 to BF16, up with a probability of the dropped half / 2^16: that is how often adding 16 random bits carries."""
    pattern = np.float32(value).view(np.uint32)
    word = np.uint32(pattern + np.uint32(random16)) >> np.uint32(16)
    return np.uint16(np.uint32(0x7FC0) if np.isnan(value) else word)


@compiled
def to_16_bits(
    value: Scalar, random32: Scalar, nearest: Scalar, mantissa: Scalar, least: Scalar, infinity: Scalar
) -> Scalar:
    """Round a float64 once to a 16-bit format, by integers: numpy and torch go through float32 and round twice.

    The magnitude is shifted until 2^32 is one unit in the target's last place, subnormals included. What is added below
    that unit decides the direction, and a carry out of the mantissa raises the exponent.

    Args:
        mantissa: stored bits of the target's mantissa.
        least: float64's biased exponent of the target's least normal number.
        infinity: the target's word for infinity.
    """
    pattern = np.float64(value).view(np.uint64)
    magnitude = pattern & np.uint64(0x7FFFFFFFFFFFFFFF)
    below = max(least - np.int64(magnitude >> np.uint64(52)), 0)  # binades under the target's normal numbers
    normal = magnitude - (np.uint64(least - 1) << np.uint64(52))
    subnormal = (magnitude & np.uint64(0xFFFFFFFFFFFFF)) | np.uint64(1 << 52)
    aligned = normal if below == 0 else subnormal
    drop = np.uint64(
        min(below + (20 - mantissa), 63)
    )  # 52 - 32 = 20; LLVM leaves shifts by 64 and more undefined
    fixed = aligned >> drop
    addend = np.uint64(random32)
    if nearest:
        fixed |= np.uint64((fixed << drop) != aligned)  # a sticky bit: what was shifted out breaks a tie
        addend = np.uint64(0x7FFFFFFF) + ((fixed >> np.uint64(32)) & np.uint64(1))
    word = min((fixed + addend) >> np.uint64(32), np.uint64(infinity))
    word |= (pattern >> np.uint64(48)) & np.uint64(0x8000)
    return np.uint16(np.uint64(infinity | (1 << (mantissa - 1))) if np.isnan(value) else word)


@compiled
def narrow(values: Array, kind: Scalar, stochastic: Scalar, bits: Scalar, address: Scalar) -> None:
    """Write `values` as words of dtype `kind`, every NaN as the canonical one (payloads differ between processors).

    Args:
        bits: address of the elements' random bits.
        address: of the output.
    """
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


@compiled
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


@compiled
def bits_per_element(kind: Scalar, compute_bytes: Scalar) -> Scalar:
    """Random bits that rounding an element takes: 16 decide float32 to BF16 exactly, as 16 bits are dropped; else 32."""
    return 16 if kind == BF16 and compute_bytes == 4 else 32


@compiled
def random_bits(key: Scalar, first: Scalar, out: Array) -> None:
    """Write random words `first` and following of the stream `key`.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) with its counter written as
    `key + index * golden`: any word can be computed alone, so chunks, threads and devices agree on it.
    """
    for i in range(out.size):
        z = np.uint64(key) + np.uint64(first + i) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = z ^ (z >> np.uint64(31))


@compiled
def random_bits_of_runs(
    key: Scalar, first: Scalar, run: Scalar, pitch: Scalar, done: Scalar, count: Scalar, size: Scalar, words: Scalar,
    address: Scalar,
) -> None:  # fmt: skip
    """Write the random bits of elements that are consecutive in runs only, each as many as at its place in the tensor.

    Args:
        first, run, pitch: see `loop.extrapolate_in`.
        done, count: the elements to write, counted over all runs.
        size: bytes for each element, 2 or 4.
        words: address of memory for the words of `count` elements and one word more.
        address: of the output.
    """
    per_word, filled = 8 // size, 0
    while filled < count:
        within = (done + filled) % run
        element = first + (done + filled) // run * pitch + within
        part = min(run - within, count - filled)
        ahead = element % per_word
        random_bits(
            key,
            element // per_word,
            carray(pointer(words), (ahead + part + per_word - 1) // per_word, np.uint64),
        )
        if size == 2:
            halves = carray(pointer(words + 2 * ahead), part, np.uint16)
            short = carray(pointer(address + 2 * filled), part, np.uint16)
            for i in range(part):
                short[i] = halves[i]
        else:
            singles = carray(pointer(words + 4 * ahead), part, np.uint32)
            long = carray(pointer(address + 4 * filled), part, np.uint32)
            for i in range(part):
                long[i] = singles[i]
        filled += part

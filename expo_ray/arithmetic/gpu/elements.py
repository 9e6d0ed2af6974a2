"""The arithmetic of single elements in Triton, bit for bit that of `cpu/words.py` and `cpu/blocks.py`.

Functions take tensors of any shape. `words` are elements as signed integers of their size, `real` is `tl.float32` or `tl.float64`, as
`Rule.compute_dtype` says. Whatever is launched must be compiled with `enable_fp_fusion=False`: Triton's default merges a product and
a sum into an FMA, which rounds once where the declaration rounds twice.
"""
# ruff: noqa: PLR0917, SIM108 - compiled functions have no keyword-only parameters, and `if` chooses what is compiled

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function when a kernel that uses it is launched, or interpret it under `TRITON_INTERPRET=1`."""
    decorated: Function = triton.jit(function)
    return decorated


@compiled
def widen(words: tl.tensor, dtype: tl.constexpr, real: tl.constexpr) -> tl.tensor:
    """Words of `dtype` as numbers, exactly."""
    if dtype == "BF16":  # the upper half of a float32
        numbers = (words.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif dtype == "F16":
        numbers = words.to(tl.float16, bitcast=True).to(tl.float32)
    elif dtype == "F32":
        numbers = words.to(tl.float32, bitcast=True)
    else:
        numbers = words.to(tl.float64, bitcast=True)
    return numbers.to(real)


@compiled
def is_finite(values: tl.tensor) -> tl.tensor:
    """Mark the numbers that are neither infinite nor NaN."""
    return tl.abs(values) < float("inf")


@compiled
def is_nan(values: tl.tensor) -> tl.tensor:
    """Mark the numbers that are NaN."""
    return values != values  # noqa: PLR0124 - Triton has no `isnan`


@compiled
def below_half(value: tl.tensor) -> tl.tensor:
    """The number that rounds a float32 to the nearest BF16, ties to even; `words.nearest_bf16` explains how."""
    return 0x7FFF + ((value.to(tl.uint32, bitcast=True) >> 16) & 1)


@compiled
def bf16_word(value: tl.tensor, low: tl.tensor) -> tl.tensor:
    """Float32 to BF16 as uint32: adding `low` to the half that is dropped carries into the half that is kept."""
    return tl.where(is_nan(value), 0x7FC0, (value.to(tl.uint32, bitcast=True) + low) >> 16)


@compiled
def round_to_bf16(value: tl.tensor) -> tl.tensor:
    """Float32 to the nearest BF16, as a float32."""
    return (bf16_word(value, below_half(value)) << 16).to(tl.float32, bitcast=True)


@compiled
def to_16_bits(value: tl.tensor, bits: tl.tensor, dtype: tl.constexpr, stochastic: tl.constexpr) -> tl.tensor:
    """Round float64 once to BF16 or F16, as uint64; `words.to_16_bits` explains how."""
    mantissa: tl.constexpr = 7 if dtype == "BF16" else 10
    least: tl.constexpr = 1023 - 126 if dtype == "BF16" else 1023 - 14
    infinity: tl.constexpr = 0x7F80 if dtype == "BF16" else 0x7C00
    pattern = value.to(tl.uint64, bitcast=True)
    magnitude = pattern & 0x7FFFFFFFFFFFFFFF
    below = tl.maximum(least - (magnitude >> 52).to(tl.int64), 0)
    subnormal = (magnitude & 0xFFFFFFFFFFFFF) | (1 << 52)
    aligned = tl.where(below == 0, magnitude - ((least - 1) << 52), subnormal)
    drop = tl.minimum(below + (20 - mantissa), 63).to(tl.uint64)
    fixed = aligned >> drop
    if stochastic:
        fixed += bits.to(tl.uint64)
    else:
        fixed |= ((fixed << drop) != aligned).to(tl.uint64)
        fixed += 0x7FFFFFFF + ((fixed >> 32) & 1)
    word = tl.minimum(fixed >> 32, infinity) | ((pattern >> 48) & 0x8000)
    return tl.where(is_nan(value), infinity | (1 << (mantissa - 1)), word)


@compiled
def narrow(
    value: tl.tensor, bits: tl.tensor, dtype: tl.constexpr, real: tl.constexpr, stochastic: tl.constexpr
) -> tl.tensor:
    """Words of `dtype`, every NaN the canonical one.

    Args:
        bits: random bits of each element, where rounding is stochastic.
    """
    if dtype == "F64":
        words = tl.where(is_nan(value), 0x7FF8 << 48, value.to(tl.float64).to(tl.int64, bitcast=True))
    elif dtype == "F32":
        words = tl.where(is_nan(value), 0x7FC0 << 16, value.to(tl.float32).to(tl.int32, bitcast=True))
    elif dtype == "BF16" and real == tl.float32:
        if stochastic:
            low = bits.to(tl.uint32)
        else:
            low = below_half(value)
        words = bf16_word(value, low).to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        word = to_16_bits(value.to(tl.float64), bits, dtype, stochastic)
        words = word.to(tl.uint16).to(tl.int16, bitcast=True)
    return words


@compiled
def random_word(key: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Word `index` of the stream `key`, as `words.random_bits` has it: 64 random bits."""
    z = key.to(tl.uint64) + index.to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@compiled
def bits_of_lane(word: tl.tensor, lane: tl.tensor, per_word: tl.constexpr) -> tl.tensor:
    """The random bits of the element that is number `lane` of the `per_word` elements that share a random word."""
    width: tl.constexpr = 64 // per_word
    return (word >> (lane * width).to(tl.uint64)) & ((1 << width) - 1)


@compiled
def apply_formula(
    d: tl.tensor,
    s: tl.tensor,
    delta: tl.tensor,
    alpha: tl.tensor,
    real: tl.constexpr,
    reference: tl.constexpr,
) -> tl.tensor:
    """The result before it is rounded to the output's dtype; `alpha` is of type `real`."""
    if reference:
        d16, s16 = round_to_bf16(d.to(tl.float32)), round_to_bf16(s.to(tl.float32))
        product = round_to_bf16(alpha.to(tl.float32) * round_to_bf16(d16 - s16))
        value = round_to_bf16(d16 + product).to(real)
    else:
        moved = tl.where(delta == 0, d, d + alpha * delta)  # -0 + 0 would be +0
        value = tl.where(alpha == 0, d, tl.where(alpha == -1, s, moved))
    return value


@compiled
def find_twins(
    d: tl.tensor, s: tl.tensor, dpo: tl.tensor, sft: tl.tensor, same_dtype: tl.constexpr
) -> tl.tensor:
    """Mark elements that are not finite and the same in both parents: by bits, or by value where the dtypes differ."""
    if same_dtype:
        same = dpo == sft
    else:
        same = d == s
    return same & ~is_finite(d)


@compiled
def extrapolate_words(
    dpo: tl.tensor, d: tl.tensor, s: tl.tensor, delta: tl.tensor, twins: tl.tensor, alpha: tl.tensor, bits: tl.tensor,
    dpo_dtype: tl.constexpr, out_dtype: tl.constexpr, rounding: tl.constexpr, real: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The output's words from dpo's words and both parents' numbers."""
    value = tl.where(twins, d, apply_formula(d, s, delta, alpha, real, rounding == "reference"))
    words = narrow(value, bits, out_dtype, real, rounding == "stochastic")
    if dpo_dtype == out_dtype:
        words = tl.where(twins, dpo, words)
        if rounding != "reference":
            words = tl.where(alpha == 0, dpo, words)
    return words

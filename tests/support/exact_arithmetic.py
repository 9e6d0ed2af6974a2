"""The declared arithmetic, computed again and slowly: from tables of every number of a format, exact integers and fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from expo_ray.arithmetic.kernels import Kernel, load_kernel
from expo_ray.arithmetic.rule import Rule
from expo_ray.arithmetic.sums import TensorStatistics

Words = npt.NDArray[np.unsignedinteger[Any]]
Numbers = npt.NDArray[np.floating[Any]]
Reals = npt.NDArray[np.float64]

WORD_TYPES: dict[str, type[np.unsignedinteger[Any]]] = {
    "BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64,
}  # fmt: skip
INFINITY: dict[str, int] = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80 << 16, "F64": 0x7FF0 << 48}
NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC0 << 16, "F64": 0x7FF8 << 48}
DTYPES = tuple(WORD_TYPES)


def values(words: Words, dtype: str) -> Numbers:
    """Elements as numpy numbers: float32 for the 16-bit formats."""
    if dtype == "BF16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return words.view(np.float16).astype(np.float32)
    return words.view(np.float32 if dtype == "F32" else np.float64)


@cache
def table(dtype: str) -> tuple[Reals, Reals]:
    """Every finite magnitude of a 16-bit format in the order of its words, and the midpoints to the next."""
    finite = values(np.arange(INFINITY[dtype], dtype=np.uint16), dtype).astype(np.float64)
    past_the_end = 2 * finite[-1] - finite[-2]
    return finite, (finite + np.append(finite[1:], past_the_end)) / 2


def rounded(real: Numbers, dtype: str) -> Words:
    """Words of the nearest numbers, ties to even, each NaN the canonical one."""
    with np.errstate(all="ignore"):
        if dtype in {"F32", "F64"}:
            words = real.astype(np.float32 if dtype == "F32" else np.float64).view(WORD_TYPES[dtype])
        else:
            _, midpoints = table(dtype)
            magnitude = np.abs(real.astype(np.float64))
            below = np.searchsorted(midpoints, magnitude, side="left")
            tie = np.searchsorted(midpoints, magnitude, side="right") != below
            words = (below + (tie & (below % 2 == 1)) + (np.signbit(real) * 0x8000)).astype(np.uint16)
    return np.where(np.isnan(real), WORD_TYPES[dtype](NAN[dtype]), words)


def formula(rule: Rule, dpo: Words, sft: Words, alpha: float) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """The result before it is rounded to the output's dtype, and where dpo's bits are kept as they are."""
    single = {rule.dpo_dtype, rule.sft_dtype} <= {"BF16", "F16"}
    real: Any = np.float32 if single else np.float64
    with np.errstate(all="ignore"):
        d, s = values(dpo, rule.dpo_dtype).astype(real), values(sft, rule.sft_dtype).astype(real)
        factor = real(alpha)
        exact = s if factor == -1 else d if factor == 0 else np.where(d == s, d, d + factor * (d - s))
    twins = (dpo == sft if rule.dpo_dtype == rule.sft_dtype else d == s) & ~np.isfinite(d)
    return np.where(twins, d, exact), twins | (factor == 0)


def nearest(rule: Rule, dpo: Words, sft: Words, alpha: float) -> Words:
    exact, kept = formula(rule, dpo, sft, alpha)
    words = rounded(exact, rule.out_dtype)
    return np.where(kept, dpo, words) if rule.out_dtype == rule.dpo_dtype else words


def splitmix64(key: int, index: int) -> int:
    z = (key + index * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def stochastic_word(real: float, dtype: str, key: int, index: int, bits: int) -> int:
    """Word of a finite number rounded stochastically by `bits` random bits."""
    finite, _ = table(dtype)
    low = int(np.searchsorted(finite, abs(real), side="right")) - 1
    past_the_end = 2 * finite[-1] - finite[-2]
    high = finite[low + 1] if low + 1 < len(finite) else past_the_end
    share = (Fraction(abs(real)) - Fraction(finite[low])) / (Fraction(high) - Fraction(finite[low]))
    per_word = 64 // bits
    random = (splitmix64(key, index // per_word) >> (bits * (index % per_word))) % 2**bits
    up = math.floor(share * 2**bits) + random >= 2**bits
    return min(low + int(up), INFINITY[dtype]) | (0x8000 if math.copysign(1, real) < 0 else 0)


def run(
    rule: Rule, dpo: Words, sft: Words, alphas: Sequence[float], *,
    key: int = 0, first: int = 0, kernel: Kernel | None = None,
) -> tuple[list[Words], list[TensorStatistics]]:  # fmt: skip
    """Call a kernel on arrays of words; returns the words and statistics of each alpha."""
    outs = [np.empty(len(dpo), WORD_TYPES[rule.out_dtype]) for _ in alphas]
    statistics = (kernel or load_kernel(rule))(
        dpo.data.cast("B"), sft.data.cast("B"), [out.data.cast("B") for out in outs],
        alphas=alphas, key=key, first=first,
    )  # fmt: skip
    return outs, statistics


def any_words(dtype: str, count: int, seed: int) -> Words:
    """Random bit patterns: every exponent, subnormals, infinities and NaN among them."""
    word = WORD_TYPES[dtype]
    patterns = np.random.default_rng(seed).integers(0, np.iinfo(word).max, count, word, endpoint=True)
    zero, infinity = word(0), word(INFINITY[dtype])
    sign = word(1 << (np.iinfo(word).bits - 1))
    specials = np.array(
        [zero, sign, infinity, infinity | sign, word(1), word(NAN[dtype]), word(NAN[dtype] + 3)]
    )
    patterns[: 4 * len(specials)] = np.tile(specials, 4)
    return patterns


def weights(dtype: str, count: int, seed: int, scale: float = 0.02) -> Words:
    """A matrix of a model."""
    return rounded(np.random.default_rng(seed).normal(0, scale, count), dtype)


def tuned(words: Words, dtype: str, seed: int, out: str | None = None, scale: float = 5e-5) -> Words:
    """The same weights after a little training, so that deltas are about an ulp of bf16 and many are zero."""
    moved = values(words, dtype) + np.random.default_rng(seed).normal(0, scale, len(words))
    return rounded(moved, out or dtype)

"""A block of whatever dtypes, values and alphas: the formula, the sums, and what is not finite; a piece of `fused`."""
# ruff: noqa: PLR0917 - compiled functions have no keyword-only parameters

from __future__ import annotations

import numpy as np
from numba import carray

from expo_ray.arithmetic.cpu.words import (
    Array,
    Scalar,
    compiled,
    element_bytes,
    from_bf16,
    narrow,
    nearest_bf16,
    pointer,
    widen,
)

BLOCK = 2048
NEAREST, STOCHASTIC, REFERENCE = range(3)


@compiled
def subtract(dpo: Array, sft: Array, delta: Array) -> Scalar:
    """Returns how many elements differ, and how many differences are not finite."""
    changed, odd = np.uint32(0), np.uint32(0)
    for i in range(BLOCK):
        delta[i] = dpo[i] - sft[i]
        changed = np.uint32(changed + np.uint32(delta[i] != 0))
        odd = np.uint32(odd + np.uint32(not (abs(delta[i]) < np.inf)))
    return np.int64(changed), np.int64(odd)


@compiled
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


@compiled
def inner_product(a: Array, b: Array, folded: Array, careful: Array) -> Scalar:
    """Sum of `a * b` by folding the upper half onto the lower until one is left: one order on every machine and device.

    Where float32 overflowed or came near its end, the block is summed again in float64 without the terms that are not
    finite.
    """
    half, quarter = BLOCK // 2, BLOCK // 4
    for i in range(quarter):
        j = i + quarter
        folded[i] = (a[i] * b[i] + a[i + half] * b[i + half]) + (a[j] * b[j] + a[j + half] * b[j + half])
    fold(folded, quarter)
    return np.float64(folded[0]) if is_sound(folded[0]) else careful_inner_product(a, b, careful)


@compiled
def is_sound(total: Scalar) -> Scalar:
    """True if a sum shows neither overflow nor underflow, nor a term that is not finite."""
    return 1e-20 < abs(total) < np.inf


@compiled
def careful_inner_product(a: Array, b: Array, folded: Array) -> Scalar:
    """In float64, without the terms that are not finite."""
    for i in range(BLOCK):
        term = np.float64(a[i]) * np.float64(b[i])
        folded[i] = term if abs(term) < np.inf else 0.0
    fold(folded, BLOCK)
    return folded[0]


@compiled
def fold(terms: Array, width: Scalar) -> None:
    """Leave the sum of the first `width` (a power of two) in front."""
    while width > 1:
        width //= 2
        for i in range(width):
            terms[i] += terms[i + width]


@compiled
def move(out: Array, dpo: Array, sft: Array) -> Scalar:
    """`out -= dpo`; returns how many elements were finite in both parents and not in `out`."""
    overflow = np.uint32(0)
    for i in range(BLOCK):
        lost = (not (abs(out[i]) < np.inf)) & (abs(dpo[i]) < np.inf) & (abs(sft[i]) < np.inf)
        overflow = np.uint32(overflow + np.uint32(lost))
        out[i] -= dpo[i]
    return np.int64(overflow)


@compiled
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


@compiled
def copy_bytes(source: Array, marked: Array, everything: Scalar, out: Array) -> None:
    """Copy the elements (rows of bytes) that are marked, or everything."""
    for i in range(marked.size):
        if marked[i] or everything:
            for j in range(source.shape[1]):
                out[i, j] = source[i, j]


@compiled
def any_block(
    dpo_at: Scalar, sft_at: Scalar, outs: Array, out_offset: Scalar, dpo_kind: Scalar, sft_kind: Scalar, out_kind: Scalar,
    rounding: Scalar, stochastic: Scalar, bits: Scalar, alphas: Array, lo: Scalar, hi: Scalar, shared: Array,
    per_alpha: Array, d: Array, s: Array, delta: Array, value: Array, folded: Array, careful: Array, twins: Array,
) -> None:  # fmt: skip
    """The elements `lo` to `hi` of a block, whatever they are; the last seven arguments are scratch."""
    dpo_size, sft_size, out_size = element_bytes(dpo_kind), element_bytes(sft_kind), element_bytes(out_kind)
    if hi - lo < BLOCK:
        for i in range(BLOCK):
            d[i] = s[i] = 0
    widen(dpo_at, dpo_kind, d[lo:hi])
    widen(sft_at, sft_kind, s[lo:hi])
    changed, odd = subtract(d, s, delta)
    shared[0] += changed
    shared[3] += inner_product(d, d, folded, careful)
    if changed:  # frozen layers: sums of nothing but zeros would be taken twice
        shared[4] += inner_product(delta, delta, folded, careful)
    dpo_bytes = carray(pointer(dpo_at), (hi - lo, dpo_size), np.uint8)
    if odd:
        sft_bytes = carray(pointer(sft_at), (hi - lo, sft_size), np.uint8)
        num_twins, num_nan, num_inf = find_twins(
            d[lo:hi], s[lo:hi], dpo_bytes, sft_bytes, dpo_kind == sft_kind, twins[lo:hi]
        )
        shared[0] -= num_twins
        shared[1] += num_nan
        shared[2] += num_inf
    for k in range(alphas.size):
        out_at = outs[k] + out_offset
        step(d, s, delta, alphas[k], rounding == REFERENCE, value)
        if odd:
            for i in range(lo, hi):
                value[i] = d[i] if twins[i] else value[i]
        narrow(value[lo:hi], out_kind, stochastic, bits, out_at)
        if odd and out_kind == dpo_kind:
            out_bytes = carray(pointer(out_at), (hi - lo, out_size), np.uint8)
            copy_bytes(dpo_bytes, twins[lo:hi], alphas[k] == 0 and rounding != REFERENCE, out_bytes)
        widen(out_at, out_kind, value[lo:hi])
        per_alpha[k, 0] += move(value, d, s)
        if changed:
            per_alpha[k, 1] += inner_product(value, delta, folded, careful)

"""The arithmetic of one block: `whole_block` for the common case in few passes, `any_block` for everything else.

Nearly every block of a model is whole, of finite BF16 words, and asked for with ordinary alphas. `whole_block` does it from words
to words without intermediate arrays, and gives up where it cannot. `any_block` takes any dtypes, values and alphas, in a pass
for each operation. Both give the same bits and the same sums.
"""
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

# Elements whose sums are added in one fixed order, so that statistics do not depend on chunks or threads. A power of two, for
# `fold`; small, so that all arrays of a block stay in the processor's nearest caches. Measured on an AMD EPYC with 48 kB of
# first-level cache, in ns per element of BF16 / F32: 256 takes 0.48 / 1.89, 1024 0.31 / 0.97, 2048 0.29 / 1.11, 8192 0.25 / 1.04.
# Another size would change the last digits of statistics, which stored receipts and manifests hold.
BLOCK = 2048
NEAREST, STOCHASTIC, REFERENCE = range(3)


@compiled
def subtract(dpo: Array, sft: Array, delta: Array) -> Scalar:
    """Write `dpo - sft` into `delta`; returns how many elements differ, and how many differences are not finite."""
    changed, odd = (
        np.uint32(0),
        np.uint32(0),
    )  # 32 bits like the float32 lanes beside them, or half the vector is idle
    for i in range(BLOCK):
        delta[i] = dpo[i] - sft[i]
        changed = np.uint32(changed + np.uint32(delta[i] != 0))
        odd = np.uint32(odd + np.uint32(not (abs(delta[i]) < np.inf)))
    return np.int64(changed), np.int64(odd)


@compiled
def apply_formula(dpo: Array, sft: Array, delta: Array, alpha: Scalar, reference: Scalar, out: Array) -> None:
    """Write the result into `out`, before it is rounded to the output's dtype.

    Three separate operations: LLVM merges a product and a sum into an FMA only under `fastmath`, which is off, and a test looks
    for `fmadd` in the machine code.
    """
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
            out[i] = dpo[i] if delta[i] == 0 else dpo[i] + product  # -0 + 0 would be +0


@compiled
def inner_product(a: Array, b: Array, folded: Array, careful: Array) -> Scalar:
    """Sum of `a * b` by folding the upper half onto the lower until one is left: one order on every machine and device.

    Halves are added lane by lane, so any vector width gives this order; a running sum would have to be computed serially.
    Where float32 overflowed or came near its end, the block is summed again in float64 without the terms that are not finite.
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
    # The last digit of a float32 sum above 1e-20 stands at 1e-28; terms that underflow, below 1e-38 each, cannot reach it.
    return 1e-20 < abs(total) < np.inf


@compiled
def careful_inner_product(a: Array, b: Array, folded: Array) -> Scalar:
    """`inner_product` in float64, without the terms that are not finite."""
    for i in range(BLOCK):
        term = np.float64(a[i]) * np.float64(b[i])
        folded[i] = term if abs(term) < np.inf else 0.0
    fold(folded, BLOCK)
    return folded[0]


@compiled
def fold(terms: Array, width: Scalar) -> None:
    """Add up the first `width` terms (a power of two) into the first."""
    while width > 1:
        width //= 2
        for i in range(width):
            terms[i] += terms[i + width]


@compiled
def move(out: Array, dpo: Array, sft: Array) -> Scalar:
    """Subtract `dpo` from `out`; returns how many elements were finite in both parents and not in `out`."""
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
    """Extrapolate the elements `lo` to `hi` of a block, whatever they are; the last seven arguments are scratch."""
    dpo_size, sft_size, out_size = element_bytes(dpo_kind), element_bytes(sft_kind), element_bytes(out_kind)
    if hi - lo < BLOCK:
        for i in range(BLOCK):
            d[i] = s[i] = 0
    widen(dpo_at, dpo_kind, d[lo:hi])
    widen(sft_at, sft_kind, s[lo:hi])
    changed, odd = subtract(d, s, delta)
    shared[0] += changed
    shared[3] += inner_product(d, d, folded, careful)
    if changed:  # in a frozen layer each sum is zero, not `is_sound`, and would be taken twice
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
        apply_formula(d, s, delta, alphas[k], rounding == REFERENCE, value)
        if odd:
            for i in range(lo, hi):
                value[i] = d[i] if twins[i] else value[i]
        narrow(value[lo:hi], out_kind, stochastic, bits, out_at)
        if odd and out_kind == dpo_kind:
            out_bytes = carray(pointer(out_at), (hi - lo, out_size), np.uint8)
            copy_bytes(dpo_bytes, twins[lo:hi], alphas[k] == 0 and rounding != REFERENCE, out_bytes)
        widen(out_at, out_kind, value[lo:hi])  # the statistics describe the weights as written
        per_alpha[k, 0] += move(value, d, s)
        if changed:
            per_alpha[k, 1] += inner_product(value, delta, folded, careful)


@compiled
def measure(dpo: Array, sft: Array, dpo_folded: Array, delta_folded: Array) -> Scalar:
    """`subtract` and both squares' `inner_product` in one pass over a whole block of BF16 words, in the same order.

    Returns how many elements differ, and the sums, not `is_sound` if an element is not finite.
    """
    half, quarter = BLOCK // 2, BLOCK // 4
    changed = np.uint32(0)
    for i in range(quarter):
        d0, d1 = from_bf16(dpo[i]), from_bf16(dpo[i + quarter])
        d2, d3 = from_bf16(dpo[i + half]), from_bf16(dpo[i + quarter + half])
        e0, e1 = d0 - from_bf16(sft[i]), d1 - from_bf16(sft[i + quarter])
        e2, e3 = d2 - from_bf16(sft[i + half]), d3 - from_bf16(sft[i + quarter + half])
        differ = np.uint32(e0 != 0) + np.uint32(e1 != 0) + np.uint32(e2 != 0) + np.uint32(e3 != 0)
        changed = np.uint32(changed + differ)
        dpo_folded[i] = (d0 * d0 + d2 * d2) + (d1 * d1 + d3 * d3)
        delta_folded[i] = (e0 * e0 + e2 * e2) + (e1 * e1 + e3 * e3)
    fold(dpo_folded, quarter)
    fold(delta_folded, quarter)
    return np.int64(changed), dpo_folded[0], delta_folded[0]


@compiled
def move_word(
    dpo: Array, sft: Array, alpha: Scalar, stochastic: Scalar, bits: Array, out: Array, i: Scalar
) -> Scalar:
    """Write one element of `move_words`; returns its share of moved_delta."""
    d = from_bf16(dpo[i])
    delta = d - from_bf16(sft[i])
    product = alpha * delta
    value = d if delta == 0 else d + product
    pattern = np.float32(value).view(np.uint32)
    below = (
        np.uint32(bits[i]) if stochastic else np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))
    )
    out[i] = np.uint16(np.uint32(pattern + below) >> np.uint32(16))
    return (from_bf16(out[i]) - d) * delta


@compiled
def move_words(
    dpo: Array, sft: Array, alpha: Scalar, stochastic: Scalar, bits: Array, out: Array, folded: Array
) -> Scalar:
    """`apply_formula`, `narrow` and `move` in one pass over a whole block of finite BF16 words; nothing here can become NaN.

    Returns moved_delta, not `is_sound` if an element overflowed.
    """
    half, quarter = BLOCK // 2, BLOCK // 4
    if stochastic:  # two loops: one that selects what is added takes 5 % longer (AMD EPYC)
        for i in range(quarter):
            folded[i] = (
                move_word(dpo, sft, alpha, True, bits, out, i)
                + move_word(dpo, sft, alpha, True, bits, out, i + half)
            ) + (
                move_word(dpo, sft, alpha, True, bits, out, i + quarter)
                + move_word(dpo, sft, alpha, True, bits, out, i + quarter + half)
            )
    else:
        for i in range(quarter):
            folded[i] = (
                move_word(dpo, sft, alpha, False, bits, out, i)
                + move_word(dpo, sft, alpha, False, bits, out, i + half)
            ) + (
                move_word(dpo, sft, alpha, False, bits, out, i + quarter)
                + move_word(dpo, sft, alpha, False, bits, out, i + quarter + half)
            )
    fold(folded, quarter)
    return folded[0]


@compiled
def whole_block(
    dpo: Array, sft: Array, outs: Array, done: Scalar, stochastic: Scalar, bits: Array, alphas: Array, shared: Array,
    per_alpha: Array, folded: Array, more_folded: Array,
) -> Scalar:  # fmt: skip
    """Extrapolate a block of BF16 words throughout, all finite, sft and dpo different, alphas neither 0 nor -1.

    Returns:
        False if the block is not like that; then nothing has been added to any sum, and `any_block` must do it.
    """
    changed, dpo_square, delta_square = measure(dpo, sft, folded, more_folded)
    if not (is_sound(dpo_square) and is_sound(delta_square)):
        return False
    for k in range(alphas.size):
        out = carray(pointer(outs[k] + done * 2), BLOCK, np.uint16)
        # In a third column until every alpha is sound, so that nothing need be taken back.
        per_alpha[k, 2] = move_words(dpo, sft, alphas[k], stochastic, bits, out, folded)
        if not is_sound(per_alpha[k, 2]):
            return False
    for k in range(alphas.size):
        per_alpha[k, 1] += per_alpha[k, 2]
    shared[0] += changed
    shared[3] += dpo_square
    shared[4] += delta_square
    return True

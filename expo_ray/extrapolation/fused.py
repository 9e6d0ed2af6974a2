"""The arithmetic on the CPU: compiled loops over blocks that stay in the first-level cache.

A block is 2048 elements, aligned to the tensor's element index. Each step is a plain loop that LLVM turns into vector
code. Nothing here may be compiled with `fastmath`: weights and sums are the same on every machine only without it.

`compiled` turns this file and `words` into machine code; nothing else imports them, as numba takes a quarter of a second.
"""
# ruff: noqa: PLR0917 - compiled functions have no keyword-only parameters

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray

from expo_ray.extrapolation.words import (
    BF16,
    Array,
    Scalar,
    bits_per_element,
    compiled,
    element_bytes,
    from_bf16,
    narrow,
    nearest_bf16,
    pointer,
    random_bits,
    widen,
)

BLOCK = 2048
NEAREST, STOCHASTIC, REFERENCE = range(3)
# Six blocks of float64, one of 32 random bits and one of bool.
SCRATCH_BYTES = 53 * BLOCK


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
    """Whether a sum shows neither overflow nor underflow, nor a term that is not finite."""
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
    """One element of `move_words`: writes it, and returns its share of moved_delta."""
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
    """`step`, `narrow` and `move` in one pass over a whole block of finite BF16 words; nothing here can become NaN.

    Returns moved_delta, not `is_sound` if an element overflowed.
    """
    half, quarter = BLOCK // 2, BLOCK // 4
    if stochastic:
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
    """What nearly every block is: BF16 words throughout, all finite, sft and dpo different, alphas that are neither 0 nor -1.

    Returns:
        False if the block is not like that; then nothing has been added to any sum, and `any_block` must do it.
    """
    changed, dpo_square, delta_square = measure(dpo, sft, folded, more_folded)
    if not (is_sound(dpo_square) and is_sound(delta_square)):
        return False
    for k in range(alphas.size):
        out = carray(pointer(outs[k] + done * 2), BLOCK, np.uint16)
        per_alpha[k, 2] = move_words(dpo, sft, alphas[k], stochastic, bits, out, folded)
        if not is_sound(per_alpha[k, 2]):
            return False
    for k in range(alphas.size):
        per_alpha[k, 1] += per_alpha[k, 2]
    shared[0] += changed
    shared[3] += dpo_square
    shared[4] += delta_square
    return True


def extrapolate_in(real: Any) -> Callable[..., None]:
    """The function to compile for one type to compute in.

    It takes integers alone, so that it can be called without numba:

        dpo, sft: addresses of a chunk's elements, aligned to them.
        outs: address of int64 addresses, one for each alpha.
        dpo_kind, sft_kind, out_kind: dtypes.
        rounding: NEAREST, STOCHASTIC or REFERENCE.
        alphas, num_alphas: address and number of alphas, of type `real`.
        key, first, count: see `arithmetic.Kernel`.
        shared: address of float64 that are increased by changed, nan, inf, dpo_square, delta_square.
        per_alpha: address of a row of float64 for each alpha, increased by overflow, moved_delta; the third is lost.
        scratch: address of `SCRATCH_BYTES`, aligned to 8.
    """

    def extrapolate(
        dpo: Scalar, sft: Scalar, outs: Scalar, dpo_kind: Scalar, sft_kind: Scalar, out_kind: Scalar, rounding: Scalar,
        alphas: Scalar, num_alphas: Scalar, key: Scalar, first: Scalar, count: Scalar, shared: Scalar,
        per_alpha: Scalar, scratch: Scalar,
    ) -> None:  # fmt: skip
        out_at = carray(pointer(outs), num_alphas, np.int64)
        alpha = carray(pointer(alphas), num_alphas, real)
        sums = carray(pointer(shared), 5, np.float64)
        rows = carray(pointer(per_alpha), (num_alphas, 3), np.float64)
        d = carray(pointer(scratch), BLOCK, real)
        s = carray(pointer(scratch + 8 * BLOCK), BLOCK, real)
        delta = carray(pointer(scratch + 16 * BLOCK), BLOCK, real)
        value = carray(pointer(scratch + 24 * BLOCK), BLOCK, real)
        folded = carray(pointer(scratch + 32 * BLOCK), BLOCK, real)
        careful = carray(pointer(scratch + 40 * BLOCK), BLOCK, np.float64)
        bits_at = scratch + 48 * BLOCK
        twins = carray(pointer(scratch + 52 * BLOCK), BLOCK, np.bool_)
        dpo_size, sft_size, out_size = (
            element_bytes(dpo_kind),
            element_bytes(sft_kind),
            element_bytes(out_kind),
        )
        random_bytes = bits_per_element(out_kind, d.itemsize) // 8
        stochastic = rounding == STOCHASTIC and out_size == 2
        usual = dpo_kind == BF16 and sft_kind == BF16 and out_kind == BF16 and rounding != REFERENCE
        for k in range(num_alphas):
            usual = usual and alpha[k] != 0 and alpha[k] != -1
        done = 0
        while done < count:
            lo = (first + done) % BLOCK
            hi = min(BLOCK, lo + count - done)
            if stochastic:
                random = carray(pointer(bits_at), BLOCK * random_bytes // 8, np.uint64)
                random_bits(key, (first + done - lo) * random_bytes // 8, random)
            if not (
                usual
                and hi - lo == BLOCK
                and whole_block(
                    carray(pointer(dpo + done * 2), BLOCK, np.uint16),
                    carray(pointer(sft + done * 2), BLOCK, np.uint16),
                    out_at, done, stochastic, carray(pointer(bits_at), BLOCK, np.uint16), alpha, sums, rows, folded, value,
                )
            ):  # fmt: skip
                any_block(
                    dpo + done * dpo_size, sft + done * sft_size, out_at, done * out_size, dpo_kind, sft_kind, out_kind,
                    rounding, stochastic, bits_at + lo * random_bytes, alpha, lo, hi, sums, rows,
                    d, s, delta, value, folded, careful, twins,
                )  # fmt: skip
            done += hi - lo

    return extrapolate

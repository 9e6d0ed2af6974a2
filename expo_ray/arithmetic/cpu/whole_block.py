"""The block that nearly every block is, whole and of finite BF16 words, in fewer passes than `any_block`; a piece of `fused`."""
# ruff: noqa: PLR0917 - compiled functions have no keyword-only parameters

from __future__ import annotations

import numpy as np
from numba import carray

from expo_ray.arithmetic.cpu.any_block import BLOCK, fold, is_sound
from expo_ray.arithmetic.cpu.words import Array, Scalar, compiled, from_bf16, pointer


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

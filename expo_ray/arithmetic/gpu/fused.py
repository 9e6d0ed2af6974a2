"""The two kernels: a chunk with its statistics for several alphas, and a part of an engine's parameter for one alpha.

Both compute a matrix of elements, a row for each random word: the elements of a row share that word, which is computed once.
"""
# ruff: noqa: PLR0917 - a kernel's parameters are given by position

from __future__ import annotations

import triton.language as tl

from expo_ray.arithmetic.gpu.elements import (
    bits_of_lane,
    compiled,
    extrapolate_words,
    find_twins,
    is_finite,
    is_nan,
    random_word,
    widen,
)

LEVELS = 11  # 2^11 elements in a block of the sums, as in `cpu/blocks.py`


@compiled
def fold(terms: tl.tensor, levels: tl.constexpr) -> tl.tensor:
    """Sum 2^levels terms by adding the upper half to the lower one until one is left, as `blocks.fold` does."""
    for level in tl.static_range(levels):
        terms = tl.sum(tl.reshape(terms, [2, 1 << (levels - 1 - level)]), axis=0)
    return tl.sum(terms, axis=0)  # of one


@compiled
def inner_product(a: tl.tensor, b: tl.tensor, levels: tl.constexpr) -> tl.tensor:
    """Sum of `a * b`, float64; `blocks.inner_product` explains the order, and when it is taken again."""
    total = fold(tl.reshape(a * b, [1 << levels]), levels).to(tl.float64)
    if ~((tl.abs(total) > 1e-20) & is_finite(total)):
        terms = a.to(tl.float64) * b.to(tl.float64)
        total = fold(tl.reshape(tl.where(is_finite(terms), terms, 0.0), [1 << levels]), levels)
    return total


@compiled
def count(marks: tl.tensor) -> tl.tensor:
    """Number of true elements of a matrix, float64."""
    return tl.sum(tl.sum(marks.to(tl.int32), axis=1), axis=0).to(tl.float64)


@compiled
def extrapolate_chunk(
    dpo: tl.tensor, sft: tl.tensor, outs: tl.tensor, alphas: tl.tensor, sums: tl.tensor,
    num_alphas: tl.tensor, key: tl.uint64, first: tl.int64, num_elements: tl.int64,
    dpo_dtype: tl.constexpr, sft_dtype: tl.constexpr, out_dtype: tl.constexpr, rounding: tl.constexpr, real: tl.constexpr,
    per_word: tl.constexpr, levels: tl.constexpr,
) -> None:  # fmt: skip
    """Extrapolate a chunk, in each program a block of 2^levels elements that is aligned to the tensor's element index.

    Args:
        dpo, sft: the chunk's words.
        outs: receives the words of each alpha, one chunk after another.
        alphas: float64.
        sums: receives a row of float64 for each block: changed, nan, inf, dpo_square, delta_square, then overflow and moved_delta
            of each alpha.
        first: index within the tensor of the chunk's first element.
        per_word: elements that share a random word.
    """
    block = tl.program_id(0).to(tl.int64)
    index = (
        tl.arange(0, (1 << levels) // per_word)[:, None] * per_word + tl.arange(0, per_word)[None, :]
    ).to(tl.int64)
    start = (block << levels) - first % (1 << levels)  # of the block in the chunk
    at = start + index
    inside = (at >= 0) & (at < num_elements)
    dpo_words = tl.load(dpo + at, mask=inside, other=0)
    sft_words = tl.load(sft + at, mask=inside, other=0)
    d, s = widen(dpo_words, dpo_dtype, real), widen(sft_words, sft_dtype, real)
    delta = d - s
    twins = find_twins(d, s, dpo_words, sft_words, dpo_dtype == sft_dtype)
    row = sums + block * (5 + 2 * num_alphas)
    tl.store(row, count((delta != 0) & ~twins))
    tl.store(row + 1, count(is_nan(d) | is_nan(s)))
    tl.store(row + 2, count(((tl.abs(d) == float("inf")) | (tl.abs(s) == float("inf"))) & ~twins))
    tl.store(row + 3, inner_product(d, d, levels))
    tl.store(row + 4, inner_product(delta, delta, levels))
    words = (first + start) // per_word + tl.arange(0, (1 << levels) // per_word)[:, None]
    # The same random bits for every alpha: two models of a pair then differ by their alphas alone.
    bits = bits_of_lane(random_word(key, words), tl.arange(0, per_word)[None, :], per_word)
    for k in range(num_alphas):
        alpha = tl.load(alphas + k).to(real)
        out_words = extrapolate_words(
            dpo_words, d, s, delta, twins, alpha, bits, dpo_dtype, out_dtype, rounding, real
        )
        tl.store(outs + k * num_elements + at, out_words, mask=inside)
        out = widen(out_words, out_dtype, real)  # the statistics describe the weights as written
        tl.store(row + 5 + 2 * k, count(is_finite(d) & is_finite(s) & ~is_finite(out)))
        tl.store(row + 6 + 2 * k, inner_product(out - d, delta, levels))


@compiled
def extrapolate_part(
    dpo: tl.tensor, sft: tl.tensor, out: tl.tensor, broken: tl.tensor,
    alpha_bits: tl.uint64, key: tl.uint64, columns: tl.int64, first: tl.int64, row_stride: tl.int64, column_stride: tl.int64,
    dpo_dtype: tl.constexpr, sft_dtype: tl.constexpr, out_dtype: tl.constexpr, rounding: tl.constexpr, real: tl.constexpr,
    per_word: tl.constexpr, aligned: tl.constexpr, block_size: tl.constexpr,
) -> None:  # fmt: skip
    """Extrapolate a matrix of elements of one tensor, whatever their order; in each program, `block_size` elements of one row.

    Args:
        dpo, sft, out: words, row after row.
        broken: int64, increased by the number of elements that no model can have; see `extrapolate_into`.
        alpha_bits: the bits of alpha as a float64: Triton would pass a Python float as float32.
        columns: elements of a row.
        first, row_stride, column_stride: the element at (row, column) is number
            `first + row * row_stride + column * column_stride` of its tensor.
        aligned: elements that are neighbours in a row share random words as in the tensor.
    """
    blocks = tl.cdiv(columns, block_size)
    row = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * block_size
    lane = tl.arange(0, per_word)[None, :]
    column = (start + tl.arange(0, block_size // per_word) * per_word)[:, None].to(tl.int64)
    at = row * columns + column + lane
    inside = column + lane < columns
    dpo_words = tl.load(dpo + at, mask=inside, other=0)
    sft_words = tl.load(sft + at, mask=inside, other=0)
    d, s = widen(dpo_words, dpo_dtype, real), widen(sft_words, sft_dtype, real)
    twins = find_twins(d, s, dpo_words, sft_words, dpo_dtype == sft_dtype)
    if aligned:
        words = random_word(key, (first + row * row_stride + column) // per_word)
        bits = bits_of_lane(words, lane, per_word)
    else:
        index = first + row * row_stride + (column + lane) * column_stride
        bits = bits_of_lane(random_word(key, index // per_word), index % per_word, per_word)
    alpha = alpha_bits.to(tl.uint64).to(tl.float64, bitcast=True).to(real)
    out_words = extrapolate_words(
        dpo_words, d, s, d - s, twins, alpha, bits, dpo_dtype, out_dtype, rounding, real
    )
    tl.store(out + at, out_words, mask=inside)
    sound = is_finite(d) & is_finite(s) & is_finite(widen(out_words, out_dtype, real))
    lost = tl.sum(tl.sum((~sound & ~(twins & ~is_nan(d))).to(tl.int64), axis=1), axis=0)
    if lost > 0:  # else every program would wait for its turn at one address
        tl.atomic_add(broken, lost)

"""The arithmetic on the CPU: a loop over the blocks of a chunk.

Blocks are aligned to the tensor's element index, wherever the chunk begins. `machine_code` compiles this file and its pieces,
`blocks` and `words`; nothing else imports them, as numba takes a quarter of a second. Each operation is a plain loop that LLVM
turns into vector code. `fastmath` must stay off: it reorders sums and merges operations, differently on each processor.
"""
# ruff: noqa: PLR0917 - compiled functions have no keyword-only parameters

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray

from expo_ray.arithmetic.cpu.blocks import BLOCK, NEAREST, STOCHASTIC, any_block, whole_block
from expo_ray.arithmetic.cpu.words import (
    BF16,
    Scalar,
    bits_per_element,
    element_bytes,
    pointer,
    random_bits,
    random_bits_of_runs,
)

# Six blocks of float64, one of 32 random bits, one of bool, and words of random bits before they are cut.
SCRATCH_BYTES = 58 * BLOCK


def extrapolate_in(real: Any) -> Callable[..., None]:
    """The function to compile for one type to compute in.

    It takes integers alone, so that it can be called without numba:

        dpo, sft: addresses of a chunk's elements, aligned to them.
        outs: address of int64 addresses, one for each alpha.
        dpo_kind, sft_kind, out_kind: dtypes.
        rounding: NEAREST, STOCHASTIC or REFERENCE.
        alphas, num_alphas: address and number of alphas, of type `real`.
        key, first, count: see `arithmetic.kernels.Kernel`.
        run, pitch: the elements lie in runs of `run` elements, of which each begins `pitch` elements after the one before it in
            the tensor; the buffers hold the runs one after the other. A whole chunk is a single run.
        shared: address of float64 that are increased by changed, nan, inf, dpo_square, delta_square.
        per_alpha: address of a row of float64 for each alpha, increased by overflow, moved_delta; the third is scratch.
        scratch: address of `SCRATCH_BYTES`, aligned to 8.
    """

    def extrapolate(
        dpo: Scalar, sft: Scalar, outs: Scalar, dpo_kind: Scalar, sft_kind: Scalar, out_kind: Scalar, rounding: Scalar,
        alphas: Scalar, num_alphas: Scalar, key: Scalar, first: Scalar, count: Scalar, shared: Scalar,
        per_alpha: Scalar, scratch: Scalar, run: Scalar, pitch: Scalar,
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
        usual = (
            dpo_kind == BF16 and sft_kind == BF16 and out_kind == BF16 and rounding in (NEAREST, STOCHASTIC)
        )
        for k in range(num_alphas):
            usual = usual and alpha[k] != 0 and alpha[k] != -1
        done = 0
        while done < count:
            lo = (first + done) % BLOCK if run >= count else 0
            hi = min(BLOCK, lo + count - done)
            if stochastic and run < count:
                random_bits_of_runs(
                    key, first, run, pitch, done, hi, random_bytes, scratch + 53 * BLOCK, bits_at
                )
            elif stochastic:
                # for the whole block, so that an element's bits do not depend on where the chunk begins
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

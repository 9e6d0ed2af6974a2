"""What a launch of either kernel takes from a rule, and the launch for parts of an engine's parameters."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_ray.arithmetic.gpu.fused import extrapolate_part
from expo_ray.arithmetic.rule import Rule
from expo_ray.config.fields import RoundingName

# Without it Triton merges a product and a sum into an FMA, which rounds once: other bytes.
EXACT = {"enable_fp_fusion": False}
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
# Elements of a program. 16 for each of its 128 threads keep several loads of 8 bytes under way.
_MOST_ELEMENTS = 2048


def constants_of(rule: Rule) -> dict[str, Any]:
    """The constants that a kernel is compiled with for a rule."""
    return {
        "dpo_dtype": rule.dpo_dtype,
        "sft_dtype": rule.sft_dtype,
        "out_dtype": rule.out_dtype,
        "rounding": rule.rounding,
        "real": tl.float32 if rule.compute_dtype == "F32" else tl.float64,
        # 16 random bits decide float32 to BF16 exactly, as 16 bits are dropped; else 32.
        "per_word": 4 if rule.compute_dtype == "F32" and rule.out_dtype == "BF16" else 2,
    }


def rounded_alpha(rule: Rule, alpha: float) -> float:
    """Alpha, rounded to the type that it is multiplied in."""
    single = rule.compute_dtype == "F32" or rule.rounding == "reference"
    return float(np.float32(alpha)) if single else alpha


def as_words(data: Tensor) -> Tensor:
    """The same memory as signed integers of the elements' size."""
    return data.view(WORDS[data.element_size()])


def extrapolate_into(
    out: Tensor, dpo: Tensor, sft: Tensor, alpha: float, *, broken: Tensor, rounding: RoundingName = "nearest", key: int = 0,
    first: int = 0, columns: int | None = None, row_stride: int | None = None, column_stride: int = 1,
) -> None:  # fmt: skip
    """Queue the extrapolation of a part of one tensor, in the order in which an engine holds it, on the current stream.

    Parents and output hold the same elements in the same order; only their numbers within the checkpoint's tensor, which choose
    the random bits, need a map. A slice of whole rows is `first` alone; columns `a` to `b` of a matrix of `n` columns are
    `first=a, columns=b - a, row_stride=n`, and their transpose is `first=a, columns=rows, row_stride=1, column_stride=n`.

    Args:
        out: contiguous, on the GPU; BF16, F16, F32 or F64. It may be a parent.
        dpo, sft: contiguous, as many elements; on the GPU, or in pinned memory, which the kernel then reads over the bus.
        broken: int64 of one element on the GPU, increased by the number of elements that no model can have: NaN in a parent,
            infinite in one parent alone, or finite in both and not in `out`.
        key: from `random_key`; used by `stochastic` alone.
        first, columns, row_stride, column_stride: the element at `row * columns + column` is number
            `first + row * row_stride + column * column_stride` of its tensor. Rows follow each other unless given.
    """
    count = out.numel()
    assert dpo.numel() == sft.numel() == count, (out.shape, dpo.shape, sft.shape)
    assert all(part.is_contiguous() for part in (out, dpo, sft))
    if count == 0:
        return
    width = columns or count
    stride = width if row_stride is None else row_stride
    assert count % width == 0, (count, width)
    if stride == width and column_stride == 1:
        width = stride = count  # one row: no program is left with the short end of another
    rule = Rule(_NAMES[dpo.dtype], _NAMES[sft.dtype], _NAMES[out.dtype], rounding)
    constants = constants_of(rule)
    per_word = constants["per_word"]
    block_size = min(_MOST_ELEMENTS, max(128, triton.next_power_of_2(width)))
    rows = count // width
    part: Any = extrapolate_part
    part[(rows * triton.cdiv(width, block_size),)](
        as_words(dpo), as_words(sft), as_words(out), broken,
        _bits(rounded_alpha(rule, alpha)), key, width, first, stride, column_stride,
        **constants,
        aligned=column_stride == 1 and first % per_word == 0 and (rows == 1 or stride % per_word == 0),
        block_size=block_size, **EXACT,
    )  # fmt: skip


def _bits(alpha: float) -> int:
    word: int = struct.unpack("<Q", struct.pack("<d", alpha))[0]
    return word

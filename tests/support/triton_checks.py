"""The GPU kernel without a GPU: `python -m tests.support.triton_checks CHECK`, where Triton can be imported.

The checks but `fused_operations` need Triton's interpreter (`TRITON_INTERPRET=1`). Each ends with an AssertionError, or prints how
many elements, chunks or kernels it has compared.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from expo_ray.arithmetic.cpu.kernel import CpuKernel
from expo_ray.arithmetic.gpu import fused
from expo_ray.arithmetic.gpu.kernel import GpuKernel
from expo_ray.arithmetic.gpu.launch import EXACT, constants_of, extrapolate_into
from expo_ray.arithmetic.rule import Rule, random_key
from expo_ray.config import RoundingName
from tests.support.exact_arithmetic import DTYPES, Words, any_words, run, tuned, weights
from tests.support.tensor_operations import FLOATS

EXACT_ROUNDINGS: tuple[RoundingName, ...] = ("nearest", "stochastic")
RULES = [
    Rule(dpo, sft, out, rounding)
    for dpo, sft, out, rounding in product(DTYPES, DTYPES, DTYPES, EXACT_ROUNDINGS)
] + [Rule(dpo, sft, "BF16", "reference") for dpo, sft in product(DTYPES, repeat=2)]
ALPHAS = (0.3, -0.5, 0.0, -1.0)
KEY = random_key(3, "lm_head.weight")
# The chunk begins and ends within a block of the sums, and within a random word.
FIRST = 1_000_003


def pair(rule: Rule, count: int) -> tuple[Words, Words]:
    """Parents of every kind of value: a third of arbitrary bit patterns, some of them shared, then weights and small deltas."""
    odd = count // 3
    sft = np.concatenate([any_words(rule.sft_dtype, odd, 1), weights(rule.sft_dtype, count - odd, 2)])
    dpo = any_words(rule.dpo_dtype, count, 3)
    dpo[odd:] = tuned(sft[odd:], rule.sft_dtype, 4, rule.dpo_dtype)
    if rule.dpo_dtype == rule.sft_dtype:
        dpo[: odd // 3] = sft[: odd // 3]
    return dpo, sft


def assert_equal_to_the_cpu(
    rule: Rule, device: str, alphas: Sequence[float] = ALPHAS, count: int = 5000
) -> int:
    """Compare words and sums; returns the number of words."""
    dpo, sft = pair(rule, count)
    expected, statistics = run(rule, dpo, sft, alphas, key=KEY, first=FIRST, kernel=CpuKernel(rule))
    outs, sums = run(rule, dpo, sft, alphas, key=KEY, first=FIRST, kernel=GpuKernel(rule, device))
    for out, words in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(out, words, err_msg=str(rule))
    assert sums == statistics, rule
    return count * len(alphas)


def rules(dpo_dtype: str) -> int:
    """Every rule of a dtype of dpo, word for word and sum for sum."""
    return sum(assert_equal_to_the_cpu(rule, "cpu") for rule in RULES if rule.dpo_dtype == dpo_dtype)


def chunks() -> int:
    """Any division into chunks gives the same words; nothing at all gives nothing; several alphas overflow on their own."""
    sizes = (1, 3, 2044, 2048, 1, 4903)
    for rounding in EXACT_ROUNDINGS:
        rule = Rule("BF16", "BF16", "F16", rounding)
        dpo, sft = pair(rule, 9000)
        (whole,), _ = run(rule, dpo, sft, [0.5], key=KEY, first=77, kernel=CpuKernel(rule))
        kernel, start = GpuKernel(rule, "cpu"), 0
        for size in sizes:
            part = slice(start, start + size)
            (out,), _ = run(rule, dpo[part], sft[part], [0.5], key=KEY, first=77 + start, kernel=kernel)
            np.testing.assert_array_equal(out, whole[part])
            start = part.stop
        assert start == 9000
    rule, nothing = Rule("BF16", "BF16", "BF16", "stochastic"), np.empty(0, np.uint16)
    (out,), (statistics,) = run(rule, nothing, nothing, [0.5], kernel=GpuKernel(rule, "cpu"))
    assert (len(out), statistics.elements, statistics.dpo_square) == (0, 0, 0)
    assert_equal_to_the_cpu(rule, "cpu", (1e38, 3e4, 0.3), 3000)
    return len(EXACT_ROUNDINGS) * len(sizes)


def parts() -> int:
    """Slices of a matrix in the order of an engine get the words of the whole matrix."""
    rows, columns, compared = 24, 96, 0
    matrix = np.arange(rows * columns).reshape(rows, columns)
    for dtype, rounding in product(("BF16", "F16", "F32"), EXACT_ROUNDINGS):
        rule = Rule(dtype, dtype, dtype, rounding)
        dpo, sft = pair(rule, matrix.size)
        (whole,), _ = run(rule, dpo, sft, [0.3], key=KEY, kernel=CpuKernel(rule))
        places: list[tuple[Any, dict[str, Any]]] = [
            (matrix, {}),
            (matrix[5:11], {"first": 5 * columns}),
            (matrix[1:, 7:], {"first": columns + 7, "columns": columns - 7, "row_stride": columns}),
            (matrix[:, 48:72], {"first": 48, "columns": 24, "row_stride": columns}),
            (
                matrix[:, 8:24].T,
                {"first": 8, "columns": rows, "row_stride": 1, "column_stride": columns},
            ),
            (matrix.reshape(-1)[3:101], {"first": 3}),
        ]
        for order, place in places:
            parents = [tensor(words[order], dtype) for words in (dpo, sft)]
            out, broken = torch.empty_like(parents[0]), torch.zeros(1, dtype=torch.int64)
            extrapolate_into(
                out, parents[0], parents[1], 0.3, broken=broken, rounding=rounding, key=KEY, **place
            )
            np.testing.assert_array_equal(words_of(out), whole[order])
            (statistics,) = run(rule, dpo[order].ravel(), sft[order].ravel(), [0.3], kernel=CpuKernel(rule))[
                1
            ]
            lost = statistics.nan + statistics.inf + statistics.overflow
            if rounding == "nearest":  # its statistics need no element index
                assert broken.item() == lost
            compared += order.size
    return compared


def tensor(words: Words, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.uint8)).view(FLOATS[dtype])


def words_of(data: torch.Tensor) -> Words:
    size = data.element_size()
    words: Words = data.view(torch.uint8).numpy().view(f"u{size}")
    return words


def fused_operations() -> int:
    """Compile both kernels for an H100 (sm_90): no product is merged with a sum, and no subnormal is flushed to zero."""
    some = [Rule(dtype, dtype, dtype, "nearest") for dtype in DTYPES]
    some += [Rule("BF16", "BF16", "BF16", "stochastic"), Rule("F32", "F32", "BF16", "reference")]
    compiled = 0
    for rule in some:
        for kernel, own in (
            (fused.extrapolate_chunk, {"levels": fused.LEVELS}),
            (fused.extrapolate_part, {"aligned": True, "block_size": 2048}),
        ):
            text = ptx(kernel, rule, own, EXACT)
            assert "st.global" in text
            assert not re.search(r"\bfma\.|\bmad\.(rn|f)|\.ftz\b|\.approx\b", text), (rule, kernel)
            compiled += 1
    # Without the option there are some, or this check sees nothing.
    assert "fma.rn.f32" in ptx(fused.extrapolate_part, some[0], {"aligned": True, "block_size": 2048}, {})
    return compiled


def ptx(kernel: Any, rule: Rule, own: Mapping[str, object], options: Mapping[str, bool]) -> str:
    """The assembly of a kernel for sm_90; needs no GPU and no driver."""
    constants = {**constants_of(rule), **own}
    types = {
        "dpo": pointer(rule.dpo_dtype), "sft": pointer(rule.sft_dtype), "out": pointer(rule.out_dtype), "outs": pointer(rule.out_dtype),
        "alphas": "*fp64", "sums": "*fp64", "broken": "*i64", "num_alphas": "i32", "key": "u64", "alpha_bits": "u64",
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i64") for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    text: str = compiled.asm["ptx"]
    return text


def pointer(dtype: str) -> str:
    return {"BF16": "*i16", "F16": "*i16", "F32": "*i32", "F64": "*i64"}[dtype]


CHECKS: dict[str, Callable[..., int]] = {
    check.__name__: check for check in (rules, chunks, parts, fused_operations)
}

if __name__ == "__main__":
    # numpy warns of the NaN and infinities that the interpreter computes.
    np.seterr(all="ignore")
    sys.stdout.write(f"{CHECKS[sys.argv[1]](*sys.argv[2:])}\n")

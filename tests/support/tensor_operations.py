"""The declared arithmetic written again as tensor operations of torch, each of which rounds once: a second opinion on the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expo_ray.arithmetic.rule import Rule
from expo_ray.arithmetic.sums import TensorStatistics, statistics_from_sums

BLOCK = 2048  # elements of a block of the sums, as in `cpu/blocks.py`
FLOATS: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
WORDS: Mapping[str, torch.dtype] = {
    "BF16": torch.int16, "F16": torch.int16, "F32": torch.int32, "F64": torch.int64,
}  # fmt: skip
NAN_WORDS = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC0 << 16, "F64": 0x7FF8 << 48}


class TensorKernel:
    """`Kernel` of one rule on the CPU."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def __call__(
        self, dpo: memoryview, sft: memoryview, outs: Sequence[memoryview], *,
        alphas: Sequence[float], key: int, first: int,
    ) -> list[TensorStatistics]:  # fmt: skip
        parents = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in (dpo, sft)]
        result = extrapolate(self._rule, parents[0], parents[1], alphas=alphas, key=key, first=first)
        for out, words in zip(outs, result.words, strict=True):
            np.frombuffer(out, np.uint8)[:] = words.contiguous().view(torch.uint8).numpy()
        with np.errstate(over="ignore"):
            totals = np.add.accumulate(result.block_sums.numpy(), axis=0)[-1]
        num = result.counts.numpy()
        return statistics_from_sums(
            parents[0].numel() // torch.empty(0, dtype=FLOATS[self._rule.dpo_dtype]).element_size(),
            [*num[:3], *totals[:2]], list(zip(num[3:], totals[2:], strict=True)),
        )  # fmt: skip


@dataclass(frozen=True)
class Extrapolated:
    """A computed chunk.

    Attributes:
        words: per alpha, the output's elements as integers.
        counts: int64 vector: changed, nan, inf, then overflow of each alpha.
        block_sums: float64, a row per block: dpo_square, delta_square, then moved_delta of each alpha.
    """

    words: Sequence[Tensor]
    counts: Tensor
    block_sums: Tensor


def extrapolate(
    rule: Rule, dpo: Tensor, sft: Tensor, *, alphas: Sequence[float], key: int, first: int
) -> Extrapolated:
    """Extrapolate a run of elements of one tensor; see `Kernel`.

    Args:
        dpo, sft: uint8 vectors of the elements' bytes, on one device.
    """
    real = FLOATS[rule.compute_dtype]
    dpo_words, sft_words = dpo.view(WORDS[rule.dpo_dtype]), sft.view(WORDS[rule.sft_dtype])
    d, s = dpo.view(FLOATS[rule.dpo_dtype]).to(real), sft.view(FLOATS[rule.sft_dtype]).to(real)
    delta = d - s
    same = dpo_words == sft_words if rule.dpo_dtype == rule.sft_dtype else d == s
    twins = same & ~torch.isfinite(d)
    finite = torch.isfinite(d) & torch.isfinite(s)
    counts = [
        (delta != 0) & ~twins,
        torch.isnan(d) | torch.isnan(s),
        (torch.isinf(d) | torch.isinf(s)) & ~twins,
    ]
    d_blocks, delta_blocks = in_blocks(d, first), in_blocks(delta, first)
    sums = [inner_products(d_blocks, d_blocks), inner_products(delta_blocks, delta_blocks)]
    # The same random bits for every alpha: two models of a pair then differ by their alphas alone.
    bits = random_bits(rule, key, first, d.numel(), d.device)
    outputs = []
    for alpha in alphas:
        value = torch.where(twins, d, formula(rule, d, s, delta, alpha))
        words = narrow(value, rule.out_dtype, bits)
        if rule.out_dtype == rule.dpo_dtype:
            kept = torch.ones_like(twins) if is_dpo(rule, alpha) else twins
            words = torch.where(kept, dpo_words, words)
        out = words.view(FLOATS[rule.out_dtype]).to(real)
        counts.append(finite & ~torch.isfinite(out))
        sums.append(inner_products(in_blocks(out - d, first), delta_blocks))
        outputs.append(words)
    return Extrapolated(outputs, torch.stack([marks.sum() for marks in counts]), torch.stack(sums, dim=1))


def rounded_alpha(rule: Rule, alpha: float) -> float:
    """Alpha, rounded to the type that it is multiplied in."""
    single = rule.compute_dtype == "F32" or rule.rounding == "reference"
    return float(np.float32(alpha)) if single else alpha


def is_dpo(rule: Rule, alpha: float) -> bool:
    """True if the result is dpo by declaration."""
    return rule.rounding != "reference" and rounded_alpha(rule, alpha) == 0


def formula(rule: Rule, d: Tensor, s: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """The result before it is rounded to the output's dtype."""
    factor = rounded_alpha(rule, alpha)
    if rule.rounding == "reference":
        # `float()` first: the compiled kernel, like the paper's script, converts F64 in two steps.
        d16, s16 = d.float().bfloat16(), s.float().bfloat16()
        return (d16 + factor * (d16 - s16)).to(d.dtype)
    if factor in {0, -1}:
        return d if factor == 0 else s
    product = factor * delta
    return torch.where(delta == 0, d, d + product)  # -0 + 0 would be +0


def narrow(value: Tensor, dtype: str, bits: Tensor | None) -> Tensor:
    """Words of `dtype`, every NaN the canonical one; `bits` if rounding is stochastic."""
    single = value.dtype == torch.float32
    if dtype in {"F32", "F64"} or (single and bits is None):
        words = value.to(FLOATS[dtype]).view(WORDS[dtype])
    elif single and dtype == "BF16" and bits is not None:
        words = ((value.view(torch.int32) + bits) >> 16).to(torch.int16)
    else:
        words = to_16_bits(value.double(), dtype, bits)
    return words.masked_fill(torch.isnan(value), NAN_WORDS[dtype])


def to_16_bits(value: Tensor, dtype: str, bits: Tensor | None) -> Tensor:
    """Round float64 once; `words.to_16_bits` explains how. `.to(torch.bfloat16)` would round to float32 first."""
    mantissa, least, infinity = (7, 1023 - 126, 0x7F80) if dtype == "BF16" else (10, 1023 - 14, 0x7C00)
    pattern = value.view(torch.int64)
    magnitude = pattern & 0x7FFFFFFFFFFFFFFF
    below = (least - (magnitude >> 52)).clamp(min=0)
    subnormal = (magnitude & 0xFFFFFFFFFFFFF) | (1 << 52)
    aligned = torch.where(below == 0, magnitude - ((least - 1) << 52), subnormal)
    drop = (below + (20 - mantissa)).clamp(max=63)
    fixed = aligned >> drop
    if bits is None:
        fixed = fixed | ((fixed << drop) != aligned)
        fixed = fixed + 0x7FFFFFFF + ((fixed >> 32) & 1)
    else:
        fixed = fixed + bits
    word = (fixed >> 32).clamp(max=infinity)
    return torch.where(pattern < 0, word | 0x8000, word).to(torch.int16)


def random_bits(rule: Rule, key: int, first: int, count: int, device: torch.device) -> Tensor | None:
    """16 random bits per element (float32 to BF16, int32) or 32 (int64); None if nothing is rounded stochastically."""
    if rule.rounding != "stochastic" or rule.out_dtype not in {"BF16", "F16"}:
        return None
    exact_in_16 = rule.compute_dtype == "F32" and rule.out_dtype == "BF16"
    per_word = 4 if exact_in_16 else 2
    begin, end = first // per_word, -(-(first + count) // per_word)
    z = torch.arange(begin, end, dtype=torch.int64, device=device) * signed(0x9E3779B97F4A7C15) + signed(key)
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    z = z ^ shifted(z, 31)
    # Torch has no unsigned types to compute in: the words are read as signed ones and masked.
    if exact_in_16:
        bits = z.view(torch.int16).to(torch.int32) & 0xFFFF
    else:
        bits = z.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return bits[first - begin * per_word :][:count]


def signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def shifted(words: Tensor, places: int) -> Tensor:
    """Words shifted right as unsigned numbers: torch's `>>` copies the sign."""
    return (words >> places) & ((1 << (64 - places)) - 1)


def in_blocks(values: Tensor, first: int) -> Tensor:
    """Values as a row for each block of the tensor's element index, zero outside the chunk."""
    lo = first % BLOCK
    blocks = values.new_zeros(max(1, -(-(lo + values.numel()) // BLOCK)) * BLOCK)
    blocks[lo : lo + values.numel()] = values
    return blocks.view(-1, BLOCK)


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum of `a * b` in every row, float64; `blocks.inner_product` explains the order."""
    total = fold(a * b).double()
    terms = a.double() * b.double()
    careful = fold(torch.where(torch.isfinite(terms), terms, 0.0))
    return torch.where((total.abs() > 1e-20) & torch.isfinite(total), total, careful)


def fold(terms: Tensor) -> Tensor:
    """Sum every row by adding its upper half to its lower one until one is left."""
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    return terms[:, 0]

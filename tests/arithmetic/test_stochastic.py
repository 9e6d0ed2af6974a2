from __future__ import annotations

import math
from hashlib import sha256

import numpy as np
import pytest

from expo_ray.arithmetic.rule import Rule, random_key
from tests.support.exact_arithmetic import (
    WORD_TYPES,
    Numbers,
    Reals,
    Words,
    formula,
    nearest,
    run,
    splitmix64,
    stochastic_word,
    table,
    tuned,
    values,
    weights,
)

BF16 = Rule("BF16", "BF16", "BF16", "stochastic")
KEY = random_key(0, "model.layers.0.mlp.up_proj.weight")
# Parents, output, and the random bits that each element takes.
COMBINATIONS = [
    ("BF16", "BF16", "BF16", 16),
    ("BF16", "F16", "BF16", 16),
    ("BF16", "BF16", "F16", 32),
    ("F16", "F16", "F16", 32),
    ("F32", "F32", "BF16", 32),
    ("F32", "F16", "F16", 32),
    ("F64", "F64", "BF16", 32),
    ("F64", "F64", "F16", 32),
]


def test_the_random_words_of_these_tests_are_splitmix64() -> None:
    # The first three outputs of the published generator for seed 0.
    assert [splitmix64(0, index) for index in (1, 2, 3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F,
    ]  # fmt: skip


def test_a_key_is_a_function_of_seed_and_name() -> None:
    assert random_key(7, "a.weight") == int.from_bytes(sha256(b"7:a.weight").digest()[:8], "little")
    keys = {random_key(seed, name) for seed in range(20) for name in ("a", "b", "1:a", "\ud800")}
    assert len(keys) == 80


@pytest.mark.parametrize(("dpo_dtype", "sft_dtype", "out_dtype", "bits"), COMBINATIONS)
@pytest.mark.parametrize("scale", [0.02, 3e-7])
def test_every_element_is_rounded_by_its_own_random_bits(
    dpo_dtype: str, sft_dtype: str, out_dtype: str, bits: int, scale: float
) -> None:
    """At 3e-7 all results are subnormals of F16."""
    rule = Rule(dpo_dtype, sft_dtype, out_dtype, "stochastic")
    sft = weights(sft_dtype, 5000, 1, scale)
    dpo = tuned(sft, sft_dtype, 2, dpo_dtype, scale / 100)
    first = 2**33 + 4093
    outs, _ = run(rule, dpo, sft, [0.3, 2.0], key=KEY, first=first)
    for alpha, out in zip((0.3, 2.0), outs, strict=True):
        exact, _ = formula(rule, dpo, sft, alpha)
        expected = [
            stochastic_word(float(real), out_dtype, KEY, first + i, bits) for i, real in enumerate(exact)
        ]
        assert out.tolist() == expected


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_ends_of_a_format(dtype: str) -> None:
    """Numbers of the format stay, tiny ones rarely become the least subnormal, those past the largest may overflow."""
    finite, _ = table(dtype)
    least, largest = finite[1], finite[-1]
    reals = np.array([0, -0.0, least, largest, -largest, least / 2, -least / 1e30, largest * (1 + 2.0**-12)])
    reals = np.repeat(reals, 4000)
    words = reals.view(np.uint64)
    (out,), (sums,) = run(Rule("F64", "F64", dtype, "stochastic"), words, words, [0.0], key=KEY)
    rows = out.reshape(-1, 4000)
    top = len(finite) - 1
    for row, word in zip(rows[:5], (0, 0x8000, 1, top, 0x8000 | top), strict=True):
        assert (row == word).all()
    assert set(rows[5].tolist()) == {0, 1}
    assert (rows[6] == 0x8000).all()
    assert set(rows[7].tolist()) == {top, top + 1}
    assert sums.overflow == (rows[7] == top + 1).sum()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_what_is_below_the_reach_of_32_bits_is_never_rounded_up(dtype: str) -> None:
    least = table(dtype)[0][1]
    words = np.repeat([least * 2.0**-33, least * 2.0**-200], 2**22).view(np.uint64)
    (out,), _ = run(Rule("F64", "F64", dtype, "stochastic"), words, words, [0.0], key=KEY)
    assert not out.any()


@pytest.mark.parametrize(
    ("out_dtype", "share"), [("BF16", 1 / 3), ("BF16", 0.9), ("F16", 1 / 3), ("F16", 0.01)]
)
@pytest.mark.parametrize("source", ["F32", "F64"])
def test_frequencies_match_the_exact_probability(out_dtype: str, share: float, source: str) -> None:
    count, ulp = 10**6, 2.0**-7 if out_dtype == "BF16" else 2.0**-10
    real = np.full(count, 1 + share * ulp, np.float32 if source == "F32" else np.float64)
    words = real.view(WORD_TYPES[source])
    (out,), _ = run(Rule(source, source, out_dtype, "stochastic"), words, words, [0.0], key=KEY)
    word_of_one = {"BF16": 0x3F80, "F16": 0x3C00}[out_dtype]
    assert set(out.tolist()) == {word_of_one, word_of_one + 1}
    exact_share = (float(real[0]) - 1) / ulp
    # Six standard deviations of a binomial share; the seed is fixed, so this cannot fail by chance tomorrow.
    bound = 6 * math.sqrt(exact_share * (1 - exact_share) / count)
    assert abs((out == word_of_one + 1).mean() - exact_share) < bound


def test_the_mean_error_of_ten_million_elements_is_below_a_thousandth_of_an_ulp() -> None:
    """An error has a variance of at most 1/4 ulp^2: the mean of 10^7 has a deviation of 1.6e-4, the bound is six of them."""
    random = np.random.default_rng(3)
    trained = random.normal(0, 0.02, 10**7).astype(np.float32)
    sft = (trained.view(np.uint32) >> 16).astype(np.uint16)
    dpo = ((trained + random.normal(0, 5e-5, 10**7).astype(np.float32)).view(np.uint32) >> 16).astype(
        np.uint16
    )
    (out,), _ = run(BF16, dpo, sft, [0.3], key=KEY)
    d, s = values(dpo, "BF16"), values(sft, "BF16")
    exact = d + np.float32(0.3) * (d - s)
    errors = in_ulps(values(out, "BF16").astype(np.float64) - exact, exact)
    assert np.abs(errors).max() < 1
    assert abs(errors.mean()) < 1e-3
    moved = d != s
    assert abs(errors[moved].mean()) < 1e-3
    # Towards the delta, too: what nearest swallows is an error along it.
    assert abs((errors * np.sign(d - s))[moved].mean()) < 1e-3


def in_ulps(errors: Reals, exact: Numbers) -> Reals:
    _, exponents = np.frexp(exact)
    ulps: Reals = np.ldexp(1.0, np.maximum(exponents - 8, -133))
    return errors / ulps


def test_small_alphas_survive() -> None:
    sft = weights("BF16", 10**6, 5)
    dpo = tuned(sft, "BF16", 6)
    _, stochastic = run(BF16, dpo, sft, [0.1, 0.3], key=KEY)
    _, rounded = run(Rule("BF16", "BF16", "BF16", "nearest"), dpo, sft, [0.1, 0.3])
    for alpha, kept, swallowed in zip((0.1, 0.3), stochastic, rounded, strict=True):
        assert kept.effective_alpha == pytest.approx(alpha, abs=0.005)
        assert abs(swallowed.effective_alpha - alpha) > 0.03


def test_elements_without_a_delta_stay() -> None:
    sft = weights("BF16", 50_000, 7)
    (out,), _ = run(BF16, sft, sft, [8.0], key=KEY)
    np.testing.assert_array_equal(out, sft)


@pytest.mark.parametrize("out_dtype", ["F32", "F64"])
def test_wide_outputs_are_rounded_to_nearest(out_dtype: str) -> None:
    sft = weights("F64", 5000, 8)
    dpo = tuned(sft, "F64", 9)
    rule = Rule("F64", "F64", out_dtype, "stochastic")
    (out,), _ = run(rule, dpo, sft, [0.3], key=KEY)
    np.testing.assert_array_equal(out, nearest(rule, dpo, sft, 0.3))


@pytest.mark.parametrize("source", ["F32", "F64"])
def test_the_bits_of_elements_tensors_and_seeds_are_unrelated(source: str) -> None:
    count = 2**20
    first = flips(source, "BF16", KEY, count)
    # The correlation of independent fair bits has a deviation of 1 / sqrt(count): 5 of them, with fixed seeds.
    bound = 5 / math.sqrt(count)
    assert abs(first.mean()) < bound
    for lag in (1, 2, 3, 4, 5, 8, 16, 64, 2048, 4096):
        assert abs((first[lag:] * first[:-lag]).mean()) < bound * 1.01, lag
    others = [
        random_key(0, "model.layers.1.mlp.up_proj.weight"),
        random_key(1, "model.layers.0.mlp.up_proj.weight"),
    ]
    for key in (*others, KEY + 1, KEY ^ (1 << 63)):
        assert abs((first * flips(source, "BF16", key, count)).mean()) < bound, key


def flips(source: str, out_dtype: str, key: int, count: int) -> Reals:
    """+1 where a number half-way between two neighbours goes up, -1 where it goes down."""
    if source == "F32":  # BF16 parents, float32 arithmetic: 1 + (1 - (1 - 2^-8)) is half-way
        dpo, sft = np.full(count, 0x3F80, np.uint16), np.full(count, 0x3F7F, np.uint16)
        rule = Rule("BF16", "BF16", out_dtype, "stochastic")
    else:
        dpo = sft = np.full(count, 1 + 2.0**-8).view(np.uint64)
        rule = Rule("F64", "F64", out_dtype, "stochastic")
    (out,), _ = run(rule, dpo, sft, [1.0], key=key)
    up: Words = out == 0x3F81
    assert set(np.unique(out).tolist()) == {0x3F80, 0x3F81}
    return np.where(up, 1.0, -1.0)

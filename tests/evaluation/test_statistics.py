from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import stats

from expo_ray.evaluation.statistics import (
    Array,
    gain,
    length_controlled_gain,
    losers,
    standard_error,
    student_quantile,
    win_rate,
)


def skewed(num_prompts: int, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Rewards and lengths of an alpha and of dpo: skewed, correlated, and longer responses better by 3 per unit of log length."""
    generator = np.random.default_rng(seed)
    ease = generator.exponential(2, num_prompts)
    dpo_lengths = generator.integers(20, 400, num_prompts).astype(float)
    lengths = np.round(dpo_lengths * np.exp(generator.normal(0.2, 0.3, num_prompts)))
    dpo = ease + generator.normal(0, 1, num_prompts)
    longer = np.log1p(lengths) - np.log1p(dpo_lengths)
    rewards = ease + 0.5 + 3 * longer + generator.exponential(1, num_prompts) - 1
    return rewards, dpo, lengths, dpo_lengths


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.998])
def test_the_interval_of_the_gain_is_the_wider_of_scipys_bca_and_t(confidence: float) -> None:
    rewards, dpo, _, _ = skewed(80)
    differences = rewards - dpo
    bca = stats.bootstrap(
        (differences,), np.mean, method="BCa", n_resamples=40_000, confidence_level=confidence,
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    # As if two more prompts lay 2.5 standard deviations from the mean.
    error = stats.sem(differences) * np.sqrt(1 + 12.5 / 80)
    low, high = stats.t.interval(confidence, 79, differences.mean(), error)
    interval = gain(rewards, dpo, confidence)
    assert interval.mean == pytest.approx(differences.mean())
    # Two resamplings of 10,000 and 40,000 agree to a few hundredths of the interval's width.
    width = bca.high - bca.low
    assert interval.low == pytest.approx(min(low, bca.low), abs=0.04 * width)
    assert interval.high == pytest.approx(max(high, bca.high), abs=0.04 * width)
    assert interval.low <= low + 1e-9


@given(st.integers(1, 1200), st.floats(0.6, 0.9999))
def test_quantiles_of_students_t_are_scipys(freedom: int, probability: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(
        stats.t.ppf(probability, freedom), rel=1e-6
    )


def test_prompts_that_hang_together_are_drawn_together() -> None:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 60, 300)
    rewards = generator.normal(0, 1, 60)[labels] + generator.normal(0, 0.1, 300)
    zero = np.zeros(300)
    interval, alone = gain(rewards, zero, clusters=labels), gain(rewards, zero)
    assert interval.mean == pytest.approx(rewards.mean())
    # The textbook's standard error of a mean over clusters, a ratio of two sums.
    sums = np.bincount(labels, rewards - rewards.mean(), 60)
    error = np.sqrt((sums**2).sum() * 60 / 59) / 300
    assert (interval.high - interval.low) / (2 * error) == pytest.approx(2.2, abs=0.3)
    assert interval.high - interval.low > 1.8 * (alone.high - alone.low)
    each = gain(rewards, zero, clusters=np.arange(300))
    assert (each.low, each.high) == pytest.approx((alone.low, alone.high), abs=1e-6)
    with pytest.raises(ValueError, match="1 cluster"):
        gain(rewards, zero, clusters=np.zeros(300, np.int64))


def test_the_length_controlled_gain_is_the_intercept_of_least_squares_refitted_in_each_resample() -> None:
    rewards, dpo, lengths, dpo_lengths = skewed(120)
    y, x = rewards - dpo, np.log1p(lengths) - np.log1p(dpo_lengths)

    def intercept(rows: NDArray[np.int64]) -> float:
        design = np.stack([np.ones(len(rows)), x[rows]], axis=1)
        return float(np.linalg.lstsq(design, y[rows], rcond=None)[0][0])

    interval = length_controlled_gain(rewards, dpo, lengths, dpo_lengths)
    everything = np.arange(len(y))
    assert interval.mean == pytest.approx(intercept(everything), rel=1e-6)
    generator = np.random.default_rng(5)
    refitted = [intercept(generator.choice(everything, len(y))) for _ in range(4000)]
    low, high = np.quantile(refitted, [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.1 * (high - low))
    assert interval.high == pytest.approx(high, abs=0.1 * (high - low))
    # Half of the raw gain was length: 0.5 is what was put in.
    assert gain(rewards, dpo).mean > 0.9
    assert interval.low < 0.5 < interval.high


def test_equal_lengths_leave_the_gain_as_it_is() -> None:
    rewards, dpo, lengths, _ = skewed(50)
    controlled, raw = length_controlled_gain(rewards, dpo, lengths, lengths), gain(rewards, dpo)
    assert (controlled.mean, controlled.low, controlled.high) == pytest.approx((raw.mean, raw.low, raw.high))


def test_a_tie_is_half_a_win() -> None:
    dpo = np.zeros(8)
    assert win_rate(np.array([1, 1, 1, 0, 0, -1, -1, -1.0]), dpo).mean == 0.5
    assert win_rate(np.array([1, 0, 0, 0, 0, 0, 0, 0.0]), dpo).mean == (1 + 7 / 2) / 8


def test_equal_rewards_have_an_interval_without_width() -> None:
    rewards = np.linspace(0, 19, 20)
    interval = gain(rewards, rewards.copy())
    assert (interval.mean, interval.low, interval.high) == (0, 0, 0)


def test_one_prompt_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        gain(np.ones(1), np.zeros(1))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_covers_the_truth_as_often_as_it_says(confidence: float) -> None:
    generator = np.random.default_rng(11)
    covered = 0
    rounds = 300
    for _ in range(rounds):
        # Skewed differences of mean 1, where a normal interval is off to one side.
        interval = gain(generator.exponential(1, 128).astype(np.float64), np.zeros(128), confidence)
        covered += interval.low <= 1 <= interval.high
    # The tail beyond is one in a thousand; the interval is wider than each of the two that it is made of.
    low, high = stats.binom.ppf([0.001, 0.999], rounds, [confidence, confidence + 0.03])
    assert low <= covered <= high


pairs_of_rewards = st.integers(2, 30).flatmap(
    lambda size: st.tuples(*(arrays(float, size, elements=st.floats(-100, 100, width=32)) for _ in range(2)))
)


@settings(max_examples=40, deadline=None)
@given(pairs_of_rewards)
def test_an_interval_holds_its_estimate_and_turns_with_the_sign(pair: tuple[Array, Array]) -> None:
    rewards, dpo = (values.astype(np.float64) for values in pair)
    forward, backward = gain(rewards, dpo), gain(dpo, rewards)
    assert forward == gain(rewards.copy(), dpo.copy())
    slack = 1e-4 * (1 + np.abs(rewards).max() + np.abs(dpo).max())
    assert forward.low - slack <= forward.mean <= forward.high + slack
    assert backward.mean == pytest.approx(-forward.mean, abs=slack)
    assert backward.low == pytest.approx(-forward.high, abs=slack + 0.05 * (forward.high - forward.low))
    assert win_rate(rewards, dpo).mean + win_rate(dpo, rewards).mean == pytest.approx(1)


def test_the_standard_error_is_that_of_a_paired_t_test() -> None:
    rewards, dpo, _, _ = skewed(40)
    test = stats.ttest_rel(rewards, dpo)
    assert (rewards - dpo).mean() / standard_error(rewards, dpo) == pytest.approx(test.statistic)


def test_of_two_alphas_the_loser_is_who_loses_a_one_sided_t_test() -> None:
    generator = np.random.default_rng(2)
    dpo = generator.normal(0, 2, 400)
    level = 0.01
    for shift in (0.0, 0.1, 0.2, 0.3, 0.5):
        worse = dpo - shift + generator.normal(0, 1.5, 400)
        p = stats.ttest_rel(worse, dpo, alternative="less").pvalue
        if not 0.5 * level < p < 2 * level:
            assert losers(np.stack([dpo, worse], axis=1), level).tolist() == [False, p < level]


def test_the_best_of_many_is_dropped_as_seldom_as_the_level_says() -> None:
    """Six equal alphas in four looks at growing data: in how many searches does the first one ever fall?"""
    generator = np.random.default_rng(8)
    rounds, fell = 300, 0
    for _ in range(rounds):
        prompts = generator.normal(0, 2, (512, 1))
        rewards = prompts + generator.standard_t(5, (512, 6))
        fell += any(losers(rewards[:size], 0.05 / 3)[0] for size in (128, 256, 512))
    assert fell <= stats.binom.ppf(0.999, rounds, 0.05)
    # Nor is the test empty: without the corrections, the same data drop it far more often.
    assert losers(rewards - np.array([0.5, 0, 0, 0, 0, 0]), 0.05 / 3)[0]


def test_identical_alphas_never_lose_to_each_other() -> None:
    rewards = np.repeat(np.random.default_rng(0).normal(size=(50, 1)), 3, axis=1)
    assert not losers(rewards, 0.05).any()

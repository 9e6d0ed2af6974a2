"""Intervals over prompts, and what they allow to claim."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from expo_ray.benchmark.intervals import (
    detectable,
    difference,
    estimate,
    holm,
    mean_of,
    outcome,
    p_value,
    pooled,
)
from expo_ray.errors import BenchmarkError


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = np.random.default_rng(0).exponential(1, 120)
    figure = estimate(mean_of(values), 120)
    wanted = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    width = wanted.high - wanted.low
    assert figure.interval.mean == pytest.approx(values.mean())
    assert figure.interval.low == pytest.approx(wanted.low, abs=0.06 * width)
    assert figure.interval.high == pytest.approx(wanted.high, abs=0.06 * width)
    assert figure.standard_error == pytest.approx(stats.sem(values), rel=0.05)


def test_a_difference_is_paired() -> None:
    generator = np.random.default_rng(2)
    ease = generator.normal(0, 5, 200)
    dpo, expo = ease + generator.normal(0, 1, 200), ease + 0.5 + generator.normal(0, 1, 200)
    figure = difference(estimate(mean_of(expo), 200), estimate(mean_of(dpo), 200))
    test = stats.ttest_rel(expo, dpo)
    assert figure.interval.mean == pytest.approx((expo - dpo).mean())
    assert figure.interval.mean / figure.standard_error == pytest.approx(test.statistic, rel=0.06)


def test_pairs_on_the_same_prompts_are_pooled_jointly() -> None:
    generator = np.random.default_rng(3)
    shared = generator.normal(1, 2, 300)
    same = [estimate(mean_of(shared), 300)] * 4
    assert pooled(same).standard_error == pytest.approx(same[0].standard_error)
    independent = [estimate(mean_of(generator.normal(1, 2, 300)), 300) for _ in range(4)]
    assert pooled(independent).standard_error == pytest.approx(2 / np.sqrt(300 * 4), rel=0.15)
    with pytest.raises(BenchmarkError):
        pooled([same[0], estimate(mean_of(shared[:100]), 100)])


@pytest.mark.parametrize("number", [0, 1])
def test_an_interval_needs_two_prompts(number: int) -> None:
    with pytest.raises(BenchmarkError, match="at least 2"):
        estimate(mean_of(np.ones(number)), number)


def test_a_detectable_difference_is_found_four_times_in_five() -> None:
    power = stats.norm.sf(stats.norm.isf(0.025), loc=detectable(1.0))
    assert power == pytest.approx(0.8, abs=1e-6)


def test_p_values_are_those_of_a_normal_test() -> None:
    assert p_value(1.7, 0.8) == pytest.approx(2 * stats.norm.sf(1.7 / 0.8))
    assert (p_value(0, 0), p_value(0.1, 0)) == (1, 0)


def test_holms_example() -> None:
    # Holm (1979) by hand: 4 * .005, 3 * .01, then 2 * .03, and the last may not fall below it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1, 1]


def test_holm_errs_as_seldom_as_it_says() -> None:
    generator = np.random.default_rng(5)
    rounds = 2000
    errors = sum(min(holm(generator.uniform(0, 1, 12).tolist())) < 0.05 for _ in range(rounds))
    assert errors <= stats.binom.ppf(0.999, rounds, 0.05)


def test_an_outcome_is_only_named_below_the_level() -> None:
    assert [outcome(1, 0.04), outcome(-1, 0.04), outcome(1, 0.05)] == ["better", "worse", "inconclusive"]

"""The Gaussian process of the gain, against the textbook's formulas on single rewards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats

from expo_ray.evaluation.search import gain_curve
from expo_ray.evaluation.search.gain_curve import DRAWS, Slice, deviation, difference, fit
from expo_ray.evaluation.statistics import Array


def rewards_at(alphas: list[float], num_prompts: int, seed: int, noise: float = 1.0) -> Array:
    """Prompts of very different levels; the gain is log(1 + alpha)."""
    generator = np.random.default_rng(seed)
    levels = generator.normal(0, 5, (num_prompts, 1))
    return np.asarray(levels + np.log1p(alphas) + generator.normal(0, noise, (num_prompts, len(alphas))))


def of_single_rewards(
    groups: list[tuple[list[float], Array]], wanted: list[float], kernel: tuple[float, float], noise: float
) -> tuple[Array, Array, float]:
    """Mean and covariance of the gain over dpo, and the log evidence up to a constant: every reward a row, every prompt a level of variance 10,000."""
    length, height = kernel

    def covariance(first: Array, second: Array) -> Array:
        apart = np.log1p(first / 0.05)[:, None] - np.log1p(second / 0.05)[None, :]
        return np.asarray(height**2 * np.exp(-0.5 * (apart / length) ** 2))

    alphas = np.concatenate([np.tile(alphas, len(rewards)) for alphas, rewards in groups])
    prompt = np.concatenate(
        [
            np.repeat(np.arange(len(rewards)) + 1000 * at, len(alphas))
            for at, (alphas, rewards) in enumerate(groups)
        ]
    )
    values = np.concatenate([rewards.ravel() for _, rewards in groups])
    of_values = (
        covariance(alphas, alphas)
        + 1e4 * (prompt[:, None] == prompt[None, :])
        + noise**2 * np.eye(len(values))
    )
    points = np.array([0.0, *wanted])
    gains = np.linalg.solve(of_values, covariance(alphas, points)).T
    mean, spread = gains @ values, covariance(points, points) - gains @ covariance(alphas, points)
    contrast = np.hstack([-np.ones((len(wanted), 1)), np.eye(len(wanted))])
    evidence = float(stats.multivariate_normal(np.zeros(len(values)), of_values).logpdf(values))
    return contrast @ mean, contrast @ spread @ contrast.T, evidence


def test_the_curve_is_that_of_a_process_over_single_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [
        (alphas, rewards_at(alphas, num_prompts, seed))
        for seed, (alphas, num_prompts) in enumerate(
            [([0.0, 0.1, 0.4, 1.6], 12), ([0.0, 0.6], 9), ([0.4, 0.9, 1.2], 15)]
        )
    ]
    slices, wanted = [Slice.of(*group) for group in groups], [0.1, 0.3, 0.9, 1.6]
    kernels = [(0.5, 1.0), (1.0, 2.0)]
    evidence = []
    for length, height in kernels:
        monkeypatch.setattr(gain_curve, "_LENGTHS", (length,))
        monkeypatch.setattr(gain_curve, "_HEIGHTS", (height,))
        noise = deviation(slices)
        mean, covariance, log_evidence = of_single_rewards(groups, wanted, (length, height * noise), noise)
        curve = fit(slices, wanted)
        assert curve.mean == pytest.approx(mean, abs=2e-3)
        assert curve.draws.shape == (len(wanted), DRAWS)
        # Of 512 draws, a standard deviation is known to three hundredths.
        assert np.cov(curve.draws) == pytest.approx(covariance, abs=0.15 * covariance.max())
        evidence.append(log_evidence)
    # Both kernels together: each weighs as its evidence.
    monkeypatch.setattr(gain_curve, "_LENGTHS", tuple(length for length, _ in kernels))
    monkeypatch.setattr(gain_curve, "_HEIGHTS", (1.0,))
    of_each = [of_single_rewards(groups, wanted, (length, noise), noise) for length, _ in kernels]
    weights = np.exp([each[2] - max(other[2] for other in of_each) for each in of_each])
    mixed = sum(weight * each[0] for weight, each in zip(weights / weights.sum(), of_each, strict=True))
    assert fit(slices, wanted).mean == pytest.approx(np.asarray(mixed), abs=5e-3)


def test_two_fits_of_the_same_slices_are_the_same() -> None:
    slices = [Slice.of([0.0, 0.2, 0.8], rewards_at([0.0, 0.2, 0.8], 40, 1))]
    first, second = (fit(slices, [0.1, 0.5]) for _ in range(2))
    assert (first.draws == second.draws).all()


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(3, 80), st.floats(0.1, 4), st.integers(0, 99))
def test_levels_of_prompts_are_no_noise(num_alphas: int, num_prompts: int, noise: float, seed: int) -> None:
    alphas = [0.1 * number for number in range(num_alphas)]
    rewards = rewards_at(alphas, num_prompts, seed, noise)
    # Two-way analysis of variance without replication.
    residuals = rewards - rewards.mean(0) - rewards.mean(1, keepdims=True) + rewards.mean()
    wanted = np.sqrt((residuals**2).sum() / ((num_prompts - 1) * (num_alphas - 1)))
    moved = rewards + np.random.default_rng(seed).normal(0, 100, (num_prompts, 1))
    for levels in (rewards, moved):
        assert deviation([Slice.of(alphas, levels)]) == pytest.approx(wanted, rel=1e-6)


def test_differences_count_the_slices_that_have_both() -> None:
    first, second = rewards_at([0.0, 0.5], 30, 1), rewards_at([0.0, 0.5, 1.0], 50, 2)
    slices = [Slice.of([0.0, 0.5], first), Slice.of([0.0, 0.5, 1.0], second)]
    both = np.concatenate([first[:, 1] - first[:, 0], second[:, 1] - second[:, 0]])
    mean, error = difference(slices, 0.5, 0.0)
    assert mean == pytest.approx(both.mean())
    assert error == pytest.approx(both.std() / np.sqrt(80), rel=0.2)
    assert difference(slices, 0.5, 7.0) == (0.0, np.inf)

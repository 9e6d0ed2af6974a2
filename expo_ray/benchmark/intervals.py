"""Bootstrap intervals of benchmark figures, tests of their differences, and the claims that these allow.

All models answer the same prompts, so prompts are resampled jointly: `counts[b, i]` is how often resample b drew prompt i, and every
figure of every model is computed from the same counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from expo_ray.errors import BenchmarkError
from expo_ray.evaluation.statistics import NORMAL, Array, bca, resample_counts
from expo_ray.report.results import Interval

# Resamples, each with a refit: enough to know the ends of a 95 % interval to a tenth of the standard error.
REFITS = 2_000
POWER = 0.8
# Computes a figure in each resample: counts (resamples, prompts) -> figures (resamples,).
Refit = Callable[[Array], Array]
Outcome = Literal["better", "worse", "inconclusive"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure with its 95 % interval, and its values in each resample, so that it can be compared with others on the same prompts.

    Attributes:
        interval: the figure and its two-sided 95 % interval.
        replicates: (resamples,), the figure in each resample of the prompts.
        without_one: (prompts,), the figure without each prompt in turn.
    """

    interval: Interval
    replicates: Array
    without_one: Array

    @property
    def standard_error(self) -> float:
        """Standard deviation over the resamples."""
        return float(self.replicates.std(ddof=1))

    @property
    def detectable(self) -> float:
        """The true difference that a two-sided test at 5 % detects with 80 % power on this number of prompts."""
        return detectable(self.standard_error)

    def moved_to(self, value: float, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """Shift figure, interval and replicates to `value`, the result of another method; cut the interval at `low` and `high`."""
        shift = value - self.interval.mean
        ends = [min(max(end + shift, low), high) for end in (self.interval.low, self.interval.high)]
        return Estimate(Interval(value, ends[0], ends[1]), self.replicates + shift, self.without_one + shift)


def estimate(refit: Refit, num_prompts: int) -> Estimate:
    """Estimate a figure by the bootstrap over prompts (BCa, 2,000 refits).

    Args:
        refit: computes the figure for each row of counts.
        num_prompts: number of prompts.

    Raises:
        BenchmarkError: if there are fewer than two prompts.
    """
    if num_prompts < 2:
        raise BenchmarkError(f"{num_prompts} prompt(s) with a verdict; an interval needs at least 2")
    everything = np.ones((1, num_prompts))
    replicates = refit(resample_counts(num_prompts)[:REFITS].astype(np.float64))
    return _joined(float(refit(everything)[0]), replicates, refit(everything - np.eye(num_prompts)))


def mean_of(values: Array) -> Refit:
    """Refit that computes the mean of a value per prompt."""
    return lambda counts: np.asarray(counts @ values / counts.sum(axis=1), np.float64)


def difference(figure: Estimate, reference: Estimate) -> Estimate:
    """Paired difference of two figures on the same prompts in the same order."""
    return _joined(
        figure.interval.mean - reference.interval.mean,
        figure.replicates - reference.replicates,
        figure.without_one - reference.without_one,
    )


def pooled(estimates: Sequence[Estimate]) -> Estimate:
    """Average one figure over several pairs of models that answered the same prompts.

    The prompts are resampled jointly, so the interval includes the variation that the pairs have in common.

    Raises:
        BenchmarkError: if there are none, or on different numbers of prompts.
    """
    if len({len(each.without_one) for each in estimates}) != 1:
        raise BenchmarkError("pairs on different prompts cannot be pooled; compare all on the same ones")
    return _joined(
        float(np.mean([each.interval.mean for each in estimates])),
        np.asarray(np.mean([each.replicates for each in estimates], axis=0)),
        np.asarray(np.mean([each.without_one for each in estimates], axis=0)),
    )


def detectable(standard_error: float, power: float = POWER) -> float:
    """The smallest true difference that a two-sided test at 5 % detects with this power."""
    return (NORMAL.inv_cdf(0.975) + NORMAL.inv_cdf(power)) * standard_error


def p_value(figure: float, standard_error: float) -> float:
    """Two-sided p-value of a difference from 0."""
    return 2 * NORMAL.cdf(-abs(figure) / standard_error) if standard_error > 0 else float(figure == 0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979): each may then be compared with the level itself."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def outcome(figure: float, adjusted_p: float, level: float = 0.05) -> Outcome:
    """Claim that a difference from 0 allows at this level."""
    if adjusted_p >= level:
        return "inconclusive"
    return "better" if figure > 0 else "worse"


def _joined(value: float, replicates: Array, without_one: Array) -> Estimate:
    return Estimate(bca(value, replicates, without_one), replicates, without_one)

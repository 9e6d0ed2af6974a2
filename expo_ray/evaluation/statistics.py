"""Statistics of paired rewards: bootstrap intervals over prompts, and comparisons of several alphas.

Everything here resamples prompts, never responses: samples of one prompt are averaged first, because they are not independent.
The resamples of n prompts are a function of n alone, so that every figure is reproducible and all figures on the same prompts
are resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from expo_ray.report.results import Interval

Array = NDArray[np.float64]
# A label for each prompt; prompts with the same one hang together.
Clusters = NDArray[np.int64]
# Takes means of columns, (..., columns), and gives the statistic, (...).
Statistic = Callable[[Array], Array]

# An end of a 95 % interval is then the 250th value from its side: two sets of resamples differ by a few hundredths of the width.
RESAMPLES = 10_000
_SEED = 20_240_425
# Resamples at a time: of 1,000 prompts, their draws take 8 MB.
_BLOCK = 1_000
NORMAL = NormalDist()
# Where a t interval puts two units that the sample lacks, in standard deviations. With 2, intervals on 96 prompts of which 1.5 % collapse cover
# 92.9 % (nominal 95); with 3, those of normal differences on 48 prompts cover 97.7 %.
_UNSEEN = 2.5


def bootstrap(
    columns: Array, statistic: Statistic, confidence: float = 0.95, *, clusters: Clusters | None = None
) -> Interval:
    """Interval of a statistic of means: from the lower of the lower ends to the higher of the upper ends of a BCa and a t interval.

    The BCa bootstrap (Efron 1987) follows a skewed distribution. Student's t is right where few prompts or few distinct rewards leave too
    little to resample, and it has room for two prompts that the sample lacks (`student_margin`). Either alone covers too seldom somewhere:
    `benchmarks/results/coverage.md`.

    Args:
        columns: (prompts, columns), what is averaged over prompts.
        statistic: function of the columns' means; refitted in each resample.
        confidence: of the two-sided interval.
        clusters: (prompts,), labels; prompts with the same one are drawn together. By default each prompt stands alone.

    Raises:
        ValueError: if there are fewer than two prompts, or clusters of them.
    """
    if clusters is not None:
        columns, statistic = _by_cluster(columns, statistic, clusters)
    units = len(columns)
    if units < 2:
        raise ValueError(
            f"{units} {'prompt(s)' if clusters is None else 'cluster(s) of prompts'}; an interval needs at least 2"
        )
    means = columns.mean(axis=0)
    value = float(statistic(means))
    replicates = np.asarray(statistic(means + resampled_deviations(columns)), np.float64)
    without_one = np.asarray(statistic(means + (means - columns) / (units - 1)), np.float64)
    resampled = bca(value, replicates, without_one, confidence)
    margin = student_margin(jackknife_error(without_one), units, confidence)
    return Interval(value, min(resampled.low, value - margin), max(resampled.high, value + margin))


def _by_cluster(columns: Array, statistic: Statistic, clusters: Clusters) -> tuple[Array, Statistic]:
    """Sums of the columns and the number of prompts in each cluster; and the statistic of the means over prompts, given theirs."""
    _, labels = np.unique(clusters, return_inverse=True)
    sums = np.zeros((labels.max() + 1, columns.shape[1] + 1))
    np.add.at(sums, labels, np.column_stack([columns, np.ones(len(columns))]))
    return sums, lambda means: statistic(means[..., :-1] / means[..., -1:])


def student_margin(error: float, units: int, confidence: float) -> float:
    """Half the width of a t interval, as if two more units had been drawn, one 2.5 standard deviations to each side.

    A sample without the rare answer that collapses looks better and steadier than it is. The two widen the interval by 12 % on 48 prompts, by
    5 % on 128 and by 1 % on 512.
    """
    unseen = math.sqrt(1 + 2 * _UNSEEN**2 / units)
    return student_quantile(0.5 + confidence / 2, units - 1) * error * unseen


def jackknife_error(without_one: Array) -> float:
    """Standard error of a statistic from its values without each unit in turn; of a mean, that of the textbooks."""
    units = len(without_one)
    return math.sqrt((units - 1) / units * float(((without_one - without_one.mean()) ** 2).sum()))


@lru_cache(maxsize=256)
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, for a probability above 1/2 and a whole number of degrees of freedom."""
    # Bisection on the angle arctan(t / sqrt(freedom)), to its last bits.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        below = _student_within(middle, freedom) < 2 * probability - 1
        low, high = (middle, high) if below else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def student_tail(value: float, freedom: int) -> float:
    """P(T > value) for Student's t distribution with a whole number of degrees of freedom."""
    within = _student_within(math.atan(abs(value) / math.sqrt(freedom)), freedom)
    return (1 - within) / 2 if value > 0 else (1 + within) / 2


def _student_within(angle: float, freedom: int) -> float:
    """P(|T| < tan(angle) sqrt(freedom)): the finite series of Abramowitz and Stegun (26.7.3 and 26.7.4)."""
    odd = freedom % 2
    steps = np.arange(1 + odd, freedom - 1, 2)
    terms = np.cumprod(steps / (steps + 1) * math.cos(angle) ** 2)
    series = 1 + float(terms.sum())
    if not odd:
        return math.sin(angle) * series
    beyond_one = math.sin(angle) * math.cos(angle) * series if freedom > 1 else 0.0
    return 2 / math.pi * (angle + beyond_one)


def bca(value: float, replicates: Array, without_one: Array, confidence: float = 0.95) -> Interval:
    """BCa interval (Efron 1987) from a statistic that was computed again for each resample.

    Args:
        value: the statistic of the sample.
        replicates: (resamples,), the statistic of each resample.
        without_one: (prompts,), the statistic of the sample without each prompt in turn.
        confidence: of the two-sided interval.
    """
    ordered = np.sort(replicates)
    pull = without_one.mean() - without_one
    spread = float((pull**2).sum()) ** 1.5
    acceleration = float((pull**3).sum()) / (6 * spread) if spread > 0 else 0.0
    # Ties count half: a win rate takes few values.
    below = (np.searchsorted(ordered, value) + np.searchsorted(ordered, value, "right")) / 2
    bias = NORMAL.inv_cdf(min(max(float(below), 1), len(ordered) - 1) / len(ordered))
    tail = NORMAL.inv_cdf((1 - confidence) / 2)
    low, high = (
        NORMAL.cdf(bias + (bias + z) / max(1 - acceleration * (bias + z), 1e-9)) for z in (tail, -tail)
    )
    ends = np.quantile(ordered, [low, high])
    return Interval(value, float(ends[0]), float(ends[1]))


def resampled_deviations(columns: Array) -> Array:
    """Means of the columns in each resample of the prompts, less their means in the sample: (resamples, columns)."""
    # Centred columns lose nothing that matters in float32, at half the time.
    centred = (columns - columns.mean(axis=0)).astype(np.float32)
    counts = resample_counts(len(columns))
    blocks = [counts[at : at + _BLOCK].astype(np.float32) @ centred for at in range(0, RESAMPLES, _BLOCK)]
    return np.asarray(np.concatenate(blocks), np.float64) / len(columns)


@lru_cache(maxsize=8)
def resample_counts(num_prompts: int) -> NDArray[np.uint8]:
    """Number of times that each prompt is drawn in each resample: (resamples, prompts)."""
    generator = np.random.default_rng([_SEED, num_prompts])
    counts = np.empty((RESAMPLES, num_prompts), np.uint8)
    rows = np.arange(_BLOCK)[:, None] * num_prompts
    for at in range(0, RESAMPLES, _BLOCK):
        drawn = generator.integers(0, num_prompts, (_BLOCK, num_prompts))
        drawn += rows
        counts[at : at + _BLOCK] = np.bincount(drawn.ravel(), minlength=_BLOCK * num_prompts).reshape(
            _BLOCK, num_prompts
        )
    return counts


def mean_of(values: Array, confidence: float = 0.95, *, clusters: Clusters | None = None) -> Interval:
    """Mean of one value for each prompt."""
    return bootstrap(values[:, None], lambda means: means[..., 0], confidence, clusters=clusters)


def gain(
    rewards: Array, reference: Array, confidence: float = 0.95, *, clusters: Clusters | None = None
) -> Interval:
    """Mean difference of rewards to a reference on the same prompts.

    Args:
        rewards: (prompts,), each the mean over the samples of a prompt.
        reference: (prompts,), the same prompts in the same order.
        confidence: of the two-sided interval.
        clusters: (prompts,), labels of prompts that hang together.
    """
    return mean_of(rewards - reference, confidence, clusters=clusters)


def win_rate(
    rewards: Array, reference: Array, confidence: float = 0.95, *, clusters: Clusters | None = None
) -> Interval:
    """Share of prompts whose reward is above the reference; a tie counts half."""
    return mean_of((1 + np.sign(rewards - reference)) / 2, confidence, clusters=clusters)


def length_controlled_gain(
    rewards: Array,
    reference: Array,
    lengths: Array,
    reference_lengths: Array,
    confidence: float = 0.95,
    *,
    clusters: Clusters | None = None,
) -> Interval:
    """The gain that is left where the responses are as long as the reference's.

    The intercept of the regression of the reward difference on the length difference, refitted in each resample. The length
    difference is taken as `log((1 + length) / (1 + reference length))`, so that ten tokens more mean much for a short
    response and little for a long one.
    """
    longer = np.log1p(lengths) - np.log1p(reference_lengths)
    better = rewards - reference
    # Moments of centred columns: those of raw ones would cancel.
    at_length, at_reward = longer.mean(), better.mean()
    x, y = longer - at_length, better - at_reward

    def intercept(means: Array) -> Array:
        mean_x, mean_y, mean_xx, mean_xy = np.moveaxis(means, -1, 0)
        variance = mean_xx - mean_x**2
        flat = variance <= 1e-12
        slope = np.where(flat, 0.0, (mean_xy - mean_x * mean_y) / np.where(flat, 1.0, variance))
        return np.asarray(at_reward + mean_y - slope * (at_length + mean_x))

    return bootstrap(np.stack([x, y, x * x, x * y], axis=1), intercept, confidence, clusters=clusters)


def at_equal_length(rewards: Array, lengths: Array) -> Array:
    """Take out of rewards what they owe to how long the responses are.

    The slope is that of rewards on log lengths once the levels of prompts and of columns are taken out, so that a column whose responses are
    all longer tells nothing of it.

    Args:
        rewards: (prompts, alphas).
        lengths: likewise, in tokens.

    Returns:
        (prompts, alphas), rewards as if all responses to a prompt were as long as the first column's.
    """
    longer = np.log1p(lengths) - np.log1p(lengths[:, :1])
    x, y = (
        values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
        for values in (longer, rewards)
    )
    variance = float((x * x).sum())
    slope = float((x * y).sum()) / variance if variance > 1e-9 else 0.0
    return np.asarray(rewards - slope * longer, np.float64)


def standard_error(rewards: Array, reference: Array, *, clusters: Clusters | None = None) -> float:
    """Standard error of the mean paired difference; by clusters, from the mean without each of them in turn."""
    differences = rewards - reference
    if clusters is None:
        return float(np.std(differences, ddof=1) / np.sqrt(len(rewards)))
    sums, mean_of_sums = _by_cluster(differences[:, None], lambda means: means[..., 0], clusters)
    means = sums.mean(axis=0)
    return jackknife_error(np.asarray(mean_of_sums(means + (means - sums) / (len(sums) - 1))))


def losers(rewards: Array, level: float) -> NDArray[np.bool_]:
    """Find the columns that are significantly below some other one.

    A search that looks at its data again and again, and each time at many alphas, finds a "significant" difference sooner or later.
    Within a look, this test corrects for it: a column is compared with all others at once, and its largest studentised deficit must
    exceed what the largest of them reaches in the bootstrap, which is resampled jointly and so knows how the columns hang together
    (max-T, Westfall and Young 1993). Over several looks, the caller spends the error in equal parts (Bonferroni): each look gets
    `level / looks`, whatever the others saw.

    Args:
        rewards: (prompts, alphas), paired by prompt.
        level: largest chance that a column which no other one truly exceeds is among the losers.

    Returns:
        (alphas,), true for the losers.
    """
    num_prompts, num_alphas = rewards.shape
    means = rewards.mean(axis=0)
    covariance = np.atleast_2d(np.cov(rewards, rowvar=False))
    variances = np.diag(covariance)
    errors = np.sqrt(np.maximum(variances[:, None] + variances[None, :] - 2 * covariance, 0) / num_prompts)
    # Identical columns have no error and no difference; the infinity makes each deficit between them 0.
    errors[errors <= 1e-12] = np.inf
    deficits = (means[None, :] - means[:, None]) / errors
    # The critical value of the largest of several deficits is at least that of one: below that, there is nothing to resample.
    suspects = np.flatnonzero(deficits.max(axis=1) > NORMAL.inv_cdf(1 - level))
    lost = np.zeros(num_alphas, bool)
    if len(suspects):
        deviations = resampled_deviations(rewards)
        for column in suspects:
            largest = ((deviations - deviations[:, [column]]) / errors[column]).max(axis=1)
            lost[column] = deficits[column].max() > np.quantile(largest, 1 - level)
    return lost

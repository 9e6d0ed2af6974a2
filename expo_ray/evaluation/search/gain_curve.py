"""The gain over dpo as a function of alpha: a Gaussian process through paired rewards of prompts that saw different alphas.

A prompt's own level says nothing of alpha, and is taken out: `k` alphas on the same prompts tell of their differences alone. So any slice of
prompts may be asked at any alphas, and all slices tell of one curve (Rasmussen and Williams 2006, chapters 2 and 5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from expo_ray.evaluation.statistics import Array
from expo_ray.report.results import FittedGain, Interval

# The curve is smooth over log(1 + alpha / 0.05): dpo lies at 0, steps beyond 0.05 are steps of the logarithm.
_LINEAR_UNTIL = 0.05
# Kernels that the evidence weighs: how far, in that unit, the curve hangs together, and how much it moves, in standard deviations of a
# response. Nothing between them is fitted: that would be sure of itself after few alphas. The shortest length is a doubling, a step of the
# climb: shorter ones found humps in the noise between two steps, and rounds were spent on them.
_LENGTHS = (0.7, 1.4, 2.8)
_HEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Kernels with less of the weight are left out: they cost time, and change no quantile.
_LEAST_WEIGHT = 0.02
# Makes the kernels invertible; far below any noise.
_JITTER = 1e-6
# A mean this far below the slice's best, in standard deviations of a response, is taken for one just so far below: the depth of a collapse
# says nothing of where the top is, and a smooth curve through it would bend the rest.
_DEEPEST = 2.0
DRAWS = 512
_SEED = 7


@dataclass(frozen=True, eq=False)
class Slice:
    """Mean rewards of some prompts, all of which were asked at the same alphas.

    Attributes:
        alphas: at least two, dpo (0) among them or not.
        num_prompts: of the slice.
        means: (alphas,).
        squares: sum of squared rewards once the levels of prompts and alphas are taken out.
        freedom: degrees of freedom of that sum.
    """

    alphas: tuple[float, ...]
    num_prompts: int
    means: Array
    squares: float
    freedom: int

    @classmethod
    def of(cls, alphas: Sequence[float], rewards: Array) -> Slice:
        """The slice with these rewards: (prompts, alphas)."""
        means = rewards.mean(axis=0)
        residuals = rewards - rewards.mean(axis=1, keepdims=True) - (means - means.mean())
        freedom = (rewards.shape[0] - 1) * (rewards.shape[1] - 1)
        return cls(tuple(alphas), len(rewards), means, float((residuals**2).sum()), freedom)


@dataclass(frozen=True, eq=False)
class GainCurve:
    """What slices say of the gain over dpo at some alphas.

    Attributes:
        alphas: in rising order.
        mean: (alphas,), the expected gain.
        draws: (alphas, `DRAWS`), gains of curves that the slices leave possible.
    """

    alphas: Array
    mean: Array
    draws: Array

    def at(self, alpha: float) -> int:
        """Place of an alpha that the curve has."""
        return int(np.abs(self.alphas - alpha).argmin())

    def fitted(self, confidence: float) -> tuple[FittedGain, ...]:
        """The curve with a band that holds the gain at each alpha by itself, with this probability."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail], axis=1)
        return tuple(
            FittedGain(float(alpha), Interval(float(mean), float(below), float(above)))
            for alpha, mean, below, above in zip(self.alphas, self.mean, low, high, strict=True)
        )


def deviation(slices: Sequence[Slice]) -> float:
    """Standard deviation of a response around the levels of its prompt and its alpha; never 0."""
    squares, freedom = sum(each.squares for each in slices), sum(each.freedom for each in slices)
    return math.sqrt(max(squares / max(freedom, 1), 1e-12))


def difference(slices: Sequence[Slice], alpha: float, other: float) -> tuple[float, float]:
    """Mean reward of `alpha` less that of `other`, on the slices that have both, and its standard error; (0, inf) without one."""
    both = [each for each in slices if alpha in each.alphas and other in each.alphas]
    num_prompts = sum(each.num_prompts for each in both)
    if not num_prompts:
        return 0.0, math.inf
    total = sum(
        each.num_prompts * (each.means[each.alphas.index(alpha)] - each.means[each.alphas.index(other)])
        for each in both
    )
    return float(total) / num_prompts, deviation(slices) * math.sqrt(2 / num_prompts)


def fit(slices: Sequence[Slice], alphas: Sequence[float], seed: int = _SEED) -> GainCurve:
    """Fit the gain over dpo at `alphas`, in rising order and above 0.

    Every kernel gives a curve, and its evidence the share of its draws. Deterministic up to the last bits of the machine's linear algebra:
    Cholesky factors, and always the same normal numbers.

    Args:
        seed: of the draws; those of two curves with the same seed hang together.
    """
    spread = deviation(slices)
    measured = np.array(sorted({alpha for each in slices for alpha in each.alphas}))
    precision, pull = _moments(slices, measured, spread)
    wanted = np.concatenate([[0.0], alphas])
    kernels = [(length, height * spread) for length in _LENGTHS for height in _HEIGHTS]
    fits = [_Fit.of(measured, precision, pull, *kernel) for kernel in kernels]
    weights = np.exp([each.evidence - max(fits, key=lambda fit: fit.evidence).evidence for each in fits])
    weights[weights < _LEAST_WEIGHT * weights.sum()] = 0
    weights /= weights.sum()
    ends = np.round(np.cumsum(weights) * DRAWS).astype(int)
    mean, draws, first = np.zeros(len(alphas)), [], 0
    for each, weight, end in zip(fits, weights, ends, strict=True):
        if weight:
            gain, root = each.gains(wanted)
            mean += weight * gain
            draws.append(gain[:, None] + root @ _normals(len(alphas), seed)[:, first:end])
            first = end
    return GainCurve(np.asarray(alphas, np.float64), mean, np.concatenate(draws, axis=1))


def _moments(slices: Sequence[Slice], measured: Array, spread: float) -> tuple[Array, Array]:
    """Precision of the means at the measured alphas, prompts' levels taken out, and its product with them."""
    place = {alpha: at for at, alpha in enumerate(measured.tolist())}
    precision, pull = np.zeros((len(measured), len(measured))), np.zeros(len(measured))
    for each in slices:
        at = [place[alpha] for alpha in each.alphas]
        means = np.maximum(each.means, each.means.max() - _DEEPEST * spread)
        weight = each.num_prompts / spread**2
        precision[np.ix_(at, at)] += weight * (np.eye(len(at)) - 1 / len(at))
        pull[at] += weight * (means - means.mean())
    return precision, pull


@dataclass(frozen=True, eq=False)
class _Fit:
    """The process with one kernel, given the measured means.

    With the kernel's Cholesky factor L, values at the measured alphas are L u; `mean` is that of u, and `factor` the Cholesky factor of
    u's precision.
    """

    measured: Array
    length: float
    height: float
    root: Array
    factor: Array
    mean: Array
    evidence: float

    @classmethod
    def of(cls, measured: Array, precision: Array, pull: Array, length: float, height: float) -> _Fit:
        unit = np.eye(len(measured))
        root = _cholesky(_kernel(measured, measured, length, height) + _JITTER * height**2 * unit)
        factor = _cholesky(unit + root.T @ precision @ root)
        half_way = np.linalg.solve(factor, root.T @ pull)
        evidence = 0.5 * float(half_way @ half_way) - float(np.log(np.diag(factor)).sum())
        mean = np.linalg.solve(factor.T, half_way)
        return cls(measured, length, height, root, factor, np.asarray(mean, np.float64), evidence)

    def gains(self, wanted: Array) -> tuple[Array, Array]:
        """Mean gain over the first of `wanted` at the others, and the Cholesky factor of its covariance."""
        across = np.linalg.solve(self.root, _kernel(self.measured, wanted, self.length, self.height)).T
        known = np.linalg.solve(self.factor, across.T)
        covariance = _kernel(wanted, wanted, self.length, self.height) - across @ across.T + known.T @ known
        mean = across @ self.mean
        to_dpo = covariance[1:, 1:] - covariance[1:, :1] - covariance[:1, 1:] + covariance[0, 0]
        jitter = _JITTER * self.height**2 * np.eye(len(wanted) - 1)
        return mean[1:] - mean[0], _cholesky(to_dpo + jitter)


def _cholesky(matrix: Array) -> Array:
    return np.asarray(np.linalg.cholesky(matrix), np.float64)


def _kernel(alphas: Array, others: Array, length: float, height: float) -> Array:
    apart = np.log1p(alphas / _LINEAR_UNTIL)[:, None] - np.log1p(others / _LINEAR_UNTIL)[None, :]
    return np.asarray(height**2 * np.exp(-0.5 * (apart / length) ** 2), np.float64)


@lru_cache(maxsize=32)
def _normals(rows: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, DRAWS))

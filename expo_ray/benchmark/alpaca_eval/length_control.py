"""Compute win rates at equal length: alpaca-eval's regression, fitted for any judge and in every resample of the prompts.

Dubois et al., arXiv 2404.04475: a logistic regression of the verdict on tanh(length difference), the difficulty of the prompt
and a constant; the length-controlled win rate is its mean prediction at a length difference of 0. Verdicts on two "gamed" baselines,
GPT-4's concise and verbose answers, determine most of the length coefficient. The published verdicts on them are GPT-4's own, so
the published regression is wrong under any other judge: a judge that ignores length would lose up to 6 points for longer answers.
`rejudged_control` uses that judge's own verdicts on the two baselines instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expo_ray.benchmark.intervals import Refit
from expo_ray.benchmark.judges.verdicts import Verdicts
from expo_ray.config.fields import LengthControlKind
from expo_ray.evaluation.statistics import Array

# alpaca-eval's `regularize_to_baseline_lambda`, shared by its two baselines.
_GAMED_WEIGHT = 0.2 / 2
# Keeps the fit finite where every verdict is the same.
_RIDGE = 1e-3
# alpaca-eval chooses its L1 penalty by cross-validation, mostly 1/2.8 or 1/21.5 depending on the order of rows. This is between.
_OFFICIAL_PENALTY = 0.18
# |x| is smoothed to sqrt(x^2 + this^2), because Newton's method needs a derivative at 0.
_ROUNDED = 0.05
# Resamples fitted at once: 16 designs of 805 prompts fit in a core's cache, 9 times as fast as 128.
_BLOCK = 16
_MOST_STEPS = 50


@dataclass(frozen=True, eq=False)
class GamedRows:
    """A judge's verdicts on the gamed baselines, one row for each prompt and baseline.

    Attributes:
        delta: (rows,), length of the baseline less that of the gamed answer, over the standard deviation of that difference.
        difficulty: (rows,), of the prompt.
        wins: (rows,), from 0 to 1.
    """

    delta: Array
    difficulty: Array
    wins: Array


@dataclass(frozen=True, eq=False)
class LengthControl:
    """The length control of a table of win rates; tables of different controls are not comparable.

    Attributes:
        kind: `official` uses GPT-4-1106's verdicts on the gamed baselines and is right for that judge alone; `rejudge` uses the
            judge's own verdicts on them; `none` fits the model's verdicts without them.
        difficulty: (prompts of the list,), alpaca-eval's difficulty of each prompt; None leaves the term out.
        gamed: rows that every fit shares; None for the kind `none`.
    """

    kind: LengthControlKind
    difficulty: Array | None
    gamed: GamedRows | None


def rejudged_control(gamed: Sequence[Verdicts], difficulty: Array) -> LengthControl:
    """Make the length control of the judge that gave these verdicts on the gamed baselines.

    Args:
        gamed: the judge's verdicts on the concise and the verbose answers against the baseline's.
        difficulty: (prompts of the list,), see `LengthControl`.
    """
    parsed = [each.parsed for each in gamed]
    return LengthControl(
        "rejudge",
        difficulty,
        GamedRows(
            np.concatenate([_scaled(each.opponent_lengths - each.lengths) for each in parsed]),
            np.concatenate([difficulty[each.index] for each in parsed]),
            np.concatenate([each.wins for each in parsed]),
        ),
    )


def controlled_win_rate(verdicts: Verdicts, control: LengthControl) -> Refit:
    """The length-controlled win rate in percent, as a figure to estimate.

    The design is alpaca-eval's. The package chooses its penalty by cross-validation for each model; here it is fixed for the official
    control, which is within 0.1 points of the package on every complete model tried, and 0 for the other controls.

    Args:
        verdicts: rows that all hold a verdict.
        control: with a difficulty for every prompt, or none.
    """
    difficulty = None if control.difficulty is None else control.difficulty[verdicts.index]
    penalty = _OFFICIAL_PENALTY if control.kind == "official" else 0.0
    regression = Regression(
        verdicts.opponent_lengths - verdicts.lengths, verdicts.wins, difficulty, control.gamed, penalty
    )
    return lambda counts: 100 * regression.win_rates(counts)


class Regression:
    """A logistic regression of verdicts on length, fitted anew for each row of counts.

    Args:
        delta: (prompts,), difference of lengths; scaled by its standard deviation in each resample.
        wins: (prompts,), from 0 to 1.
        difficulty: (prompts,), or None for a regression on length and a constant.
        gamed: rows that every fit shares, whatever the counts.
        penalty: of the sum of the coefficients' absolute values (L1).
    """

    def __init__(
        self,
        delta: Array,
        wins: Array,
        difficulty: Array | None = None,
        gamed: GamedRows | None = None,
        penalty: float = 0.0,
    ) -> None:
        self._penalty = penalty
        # Centred, so that the variance in a resample loses no digits; only its square root is used.
        self._delta, self._centred, self._wins = delta, delta - delta.mean(), wins
        self._fixed = np.stack(
            [np.ones_like(delta)] if difficulty is None else [difficulty, np.ones_like(delta)], axis=1
        )
        width = 1 + self._fixed.shape[1]
        self._gamed = np.zeros((0, width))
        self._gamed_wins = np.zeros(0)
        if gamed is not None and difficulty is not None:
            columns = [np.tanh(gamed.delta), gamed.difficulty, np.zeros_like(gamed.delta)]
            self._gamed, self._gamed_wins = np.stack(columns, axis=1), gamed.wins
        self._gamed_products = (self._gamed[:, :, None] * self._gamed[:, None, :]).reshape(-1, width**2)

    def win_rates(self, counts: Array) -> Array:
        """Mean prediction at equal length for each row of counts, from 0 to 1: (resamples,)."""
        coefficients = self.coefficients(counts)
        rates = _logistic(coefficients[:, 1:] @ self._fixed.T)
        return np.asarray((counts * rates).sum(axis=1) / counts.sum(axis=1))

    def coefficients(self, counts: Array) -> Array:
        """Coefficients of length, difficulty (if given) and constant for each row of counts: (resamples, 2 or 3)."""
        # The fit of all prompts is close to that of any resample.
        start = self._fit(np.ones((1, len(self._wins))), np.zeros((1, 1 + self._fixed.shape[1])))
        blocks = [self._fit(counts[at : at + _BLOCK], start) for at in range(0, len(counts), _BLOCK)]
        return np.concatenate(blocks)

    def _fit(self, counts: Array, start: Array) -> Array:
        """Fit all rows of counts at once by Newton's method."""
        design = self._design(counts)
        coefficients = np.repeat(start, len(counts), axis=0)
        for _ in range(_MOST_STEPS):
            step = self._step(counts, design, coefficients)
            # Where verdicts are nearly separable by length, a full first step may overshoot.
            step *= np.minimum(1, 4 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-12))
            coefficients += step
            if np.abs(step).max() < 1e-6:
                break
        return coefficients

    def _step(self, counts: Array, design: Array, coefficients: Array) -> Array:
        fitted = _logistic((coefficients[:, None, :] @ design)[:, 0, :])
        gradient = (design @ (counts * (self._wins - fitted))[:, :, None])[:, :, 0]
        hessian = design @ (design * (counts * fitted * (1 - fitted))[:, None, :]).transpose(0, 2, 1)
        on_gamed = _logistic(coefficients @ self._gamed.T)
        gradient += _GAMED_WEIGHT * (self._gamed_wins - on_gamed) @ self._gamed
        size = np.sqrt(coefficients**2 + _ROUNDED**2)
        gradient -= (self._penalty / size + _RIDGE) * coefficients
        hessian += _GAMED_WEIGHT * ((on_gamed * (1 - on_gamed)) @ self._gamed_products).reshape(hessian.shape)
        diagonal = np.arange(hessian.shape[-1])
        hessian[:, diagonal, diagonal] += self._penalty * _ROUNDED**2 / size**3 + _RIDGE
        return np.asarray(np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0])

    def _design(self, counts: Array) -> Array:
        """(resamples, columns, prompts); only the column of lengths depends on the resample."""
        total = counts.sum(axis=1)
        mean = counts @ self._centred / total
        variance = (counts @ self._centred**2 - total * mean**2) / np.maximum(total - 1, 1)
        # If all lengths are equal there is nothing to control for, and the column becomes 0.
        scale = np.where(variance > 1e-9, np.sqrt(np.maximum(variance, 1e-9)), np.inf)
        design = np.empty((len(counts), 1 + self._fixed.shape[1], counts.shape[1]))
        design[:, 0] = np.tanh(self._delta / scale[:, None])
        design[:, 1:] = self._fixed.T
        return design


def _scaled(delta: Array) -> Array:
    spread = float(delta.std(ddof=1)) if len(delta) > 1 else 0.0
    return np.asarray(delta / spread) if spread > 0 else np.zeros_like(delta)


def _logistic(values: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * values)))

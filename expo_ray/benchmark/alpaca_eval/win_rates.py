"""Compute AlpacaEval 2.0 win rates of models against one baseline, raw and at equal length, and their paired differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expo_ray.benchmark.alpaca_eval.length_control import LengthControl, controlled_win_rate
from expo_ray.benchmark.intervals import Estimate, difference, estimate, mean_of
from expo_ray.benchmark.judges.verdicts import Verdicts
from expo_ray.config.fields import LengthControlKind
from expo_ray.errors import BenchmarkError
from expo_ray.text import shown


@dataclass(frozen=True, eq=False)
class ArmScore:
    """A model's win rates against the baseline, in percent.

    Attributes:
        verdicts: rows that the score was computed from; all hold a verdict.
        win_rate: as judged.
        controlled: at equal length; None if no length control is right for the judge.
        control: kind of the length control.
        unparsed: prompts without a verdict.
    """

    verdicts: Verdicts
    win_rate: Estimate
    controlled: Estimate | None
    control: LengthControlKind | None
    unparsed: int


@dataclass(frozen=True, eq=False)
class ArmDifference:
    """A model's win rates minus those of a reference on the same prompts, in points.

    Attributes:
        model: name of the model.
        reference: name of the model that it is compared with.
        index: (prompts,), int64: places of the prompts on which both have a verdict.
    """

    model: str
    reference: str
    win_rate: Estimate
    controlled: Estimate | None
    index: NDArray[np.int64]

    @property
    def prompts(self) -> int:
        """The number of those prompts."""
        return len(self.index)


def score_arm(
    verdicts: Verdicts, control: LengthControl | None, *, package_value: float | None = None
) -> ArmScore:
    """Compute a model's win rates.

    Args:
        verdicts: of one model against the baseline.
        control: right for the judge, or None for raw win rates alone.
        package_value: alpaca-eval's own length-controlled win rate, in percent; with it the refitted interval is moved to this
            value, by at most 0.15.

    Raises:
        BenchmarkError: if fewer than two prompts hold a verdict.
    """
    rows = verdicts.parsed
    if len(rows.index) < 2:
        raise BenchmarkError(
            f"{shown(verdicts.model)}: {len(rows.index)} prompt(s) with a verdict; a score with its interval needs at least 2"
        )
    controlled = None
    if control is not None:
        controlled = estimate(controlled_win_rate(rows, control), len(rows.index))
        if package_value is not None:
            controlled = controlled.moved_to(package_value, 0, 100)
    return ArmScore(
        rows,
        estimate(mean_of(100 * rows.wins), len(rows.index)),
        controlled,
        control.kind if control else None,
        verdicts.unparsed,
    )


def compare_arms(
    model: ArmScore,
    reference: ArmScore,
    control: LengthControl | None,
) -> ArmDifference:
    """Compute the paired differences of two models on the prompts on which both have a verdict.

    Args:
        model: the model in question.
        reference: the model that it is compared with; same baseline, judge and control.
        control: length control of both.

    Raises:
        BenchmarkError: if they have another baseline or judge, or fewer than two prompts in common.
    """
    sides = [(arm.verdicts.opponent, arm.verdicts.judge, arm.control) for arm in (model, reference)]
    if sides[0] != sides[1]:
        raise BenchmarkError(
            f"{model.verdicts.model} and {reference.verdicts.model} differ in baseline, judge or length control "
            f"({_side(*sides[0])}; {_side(*sides[1])}); compare models that one judge compared with one baseline"
        )
    common = np.intersect1d(model.verdicts.index, reference.verdicts.index)
    arms = [
        arm if len(arm.verdicts.index) == len(common) else score_arm(arm.verdicts.at(common), control)
        for arm in (model, reference)
    ]
    controlled = None
    if arms[0].controlled and arms[1].controlled:
        controlled = difference(arms[0].controlled, arms[1].controlled)
    return ArmDifference(
        model.verdicts.model,
        reference.verdicts.model,
        difference(arms[0].win_rate, arms[1].win_rate),
        controlled,
        common,
    )


def _side(opponent: str, judge: str, control: LengthControlKind | None) -> str:
    return f"{opponent}, {judge or 'unnamed judge'}, {control or 'none'}"

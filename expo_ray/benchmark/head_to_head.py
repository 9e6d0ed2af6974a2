"""Compute the result of two models that were judged against each other: win rate, raw and at equal length.

Judging head to head in both orders costs as many judgments as judging two models against a baseline in one order, and depends on no
baseline and no verdict of GPT-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from expo_ray.benchmark.alpaca_eval.length_control import Regression
from expo_ray.benchmark.intervals import Estimate, estimate, mean_of, p_value
from expo_ray.benchmark.judges.verdicts import Verdicts
from expo_ray.errors import BenchmarkError
from expo_ray.evaluation.statistics import Array
from expo_ray.text import shown


@dataclass(frozen=True, eq=False)
class HeadToHead:
    """Share of prompts on which a model's answer is judged better than its opponent's, in percent; 50 means equally good.

    Attributes:
        model: such as `pair@0.5`.
        opponent: such as `pair@0`.
        judge: name of the judge.
        win_rate: as judged.
        controlled: win rate at equal length: what the intercept of a logistic regression of the verdicts on
            tanh(length difference over its standard deviation) predicts. The primary figure.
        index: (prompts,), int64: places of the prompts with a verdict in each order asked for.
        unparsed: number of prompts without such verdicts.
        length_ratio: mean length of the model's answers over its opponent's; None if those are all empty.
    """

    model: str
    opponent: str
    judge: str
    win_rate: Estimate
    controlled: Estimate
    index: NDArray[np.int64]
    unparsed: int
    length_ratio: float | None

    @property
    def prompts(self) -> int:
        """The number of prompts with a verdict."""
        return len(self.index)

    @cached_property
    def p_value(self) -> float:
        """Two-sided p-value of the length-controlled win rate against 50, from its log-odds and their bootstrap standard error."""
        spread = float(_log_odds(self.controlled.replicates).std(ddof=1))
        return p_value(float(_log_odds(np.array(self.controlled.interval.mean))), spread)


def head_to_head(verdicts: Verdicts) -> HeadToHead:
    """Compute win rate and length-controlled win rate with their intervals.

    Args:
        verdicts: of the model against its opponent, orders averaged (`verdicts_of`).

    Raises:
        BenchmarkError: if fewer than two prompts hold a verdict.
    """
    rows = verdicts.parsed
    if len(rows.index) < 2:
        raise BenchmarkError(
            f"{shown(verdicts.model)} against {shown(verdicts.opponent)}: {len(rows.index)} prompt(s) with a verdict; an interval "
            "needs at least 2"
        )
    regression = Regression(rows.lengths - rows.opponent_lengths, rows.wins)
    num_prompts = len(rows.index)
    opponent_length = float(rows.opponent_lengths.mean())
    return HeadToHead(
        verdicts.model,
        verdicts.opponent,
        verdicts.judge,
        estimate(mean_of(100 * rows.wins), num_prompts),
        estimate(lambda counts: 100 * regression.win_rates(counts), num_prompts),
        rows.index,
        verdicts.unparsed,
        float(rows.lengths.mean()) / opponent_length if opponent_length else None,
    )


def _log_odds(percent: Array) -> Array:
    share = np.clip(percent / 100, 1e-6, 1 - 1e-6)
    return np.asarray(np.log(share / (1 - share)))

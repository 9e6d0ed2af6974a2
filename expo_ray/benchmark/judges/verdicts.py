"""Verdicts of a judge on two answers to a prompt: one by one (`Judgment`), and as columns of numbers (`Verdicts`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from expo_ray.errors import BenchmarkError
from expo_ray.evaluation.statistics import Array


@dataclass(frozen=True, slots=True)
class Judgment:
    """A verdict of a judge. `model_2` is the model in question, `model_1` its baseline, whichever was shown first.

    Attributes:
        key: digest of everything that affects the verdict: judge, protocol, template, order, instruction and both texts.
        judge: name of the judge.
        instruction: the prompt.
        model_1: name of the baseline.
        model_2: name of the model.
        length_1: characters of the baseline's answer.
        length_2: characters of the model's answer.
        switched: the model's answer was shown first.
        preference: 1 if the baseline's answer is better for certain, 2 if the model's is, 1.5 for a draw; None if the judge's
            text holds no verdict.
        text: of the judge's answer; empty for identical outputs, which are a draw without a request.
        log_probabilities: of the judge's first token, by token.
        input_tokens: of the request.
        output_tokens: of the answer.
        cost: in the currency of the judge's price.
    """

    key: str
    judge: str
    instruction: str
    model_1: str
    model_2: str
    length_1: int
    length_2: int
    switched: bool
    preference: float | None
    text: str = ""
    log_probabilities: Mapping[str, float] = field(default_factory=dict)
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, eq=False)
class Verdicts:
    """The verdicts on one model's answers against another's, one row for each prompt.

    Attributes:
        model: name of the model in question.
        opponent: name of the model it is compared with.
        judge: name of the judge; empty if unknown.
        index: (prompts,), int64, ascending: place of each prompt in the list of prompts.
        wins: (prompts,), preference for the model's answer, from 0 to 1; NaN without a verdict.
        lengths: (prompts,), characters of the model's answers.
        opponent_lengths: (prompts,), characters of the other model's answers.
    """

    model: str
    opponent: str
    judge: str
    index: NDArray[np.int64]
    wins: Array
    lengths: Array
    opponent_lengths: Array

    @property
    def parsed(self) -> Verdicts:
        """The rows that hold a verdict."""
        return self.rows(~np.isnan(self.wins))

    @property
    def unparsed(self) -> int:
        """The number of rows without a verdict."""
        return int(np.isnan(self.wins).sum())

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Verdicts:
        """The chosen rows, by mask or by number."""
        return replace(
            self,
            index=self.index[chosen],
            wins=self.wins[chosen],
            lengths=self.lengths[chosen],
            opponent_lengths=self.opponent_lengths[chosen],
        )

    def at(self, index: NDArray[np.int64]) -> Verdicts:
        """The rows of the prompts at these places, all of which have to be present."""
        return self.rows(np.searchsorted(self.index, index))


def verdicts_of(judgments: Iterable[Judgment], prompts: Sequence[str]) -> Verdicts:
    """Average the judgments of both orders of each prompt, and sort the prompts as in the list.

    If one order has no verdict the prompt has none, because a single order includes the judge's preference for a position.

    Args:
        judgments: of one judge on one pair of models, each prompt and order at most once.
        prompts: the list of prompts, all different.

    Raises:
        BenchmarkError: if they are of several pairs of models or judges, or of a prompt that is not in the list, or if there are none.
    """
    rows = list(judgments)
    sides = {(row.model_2, row.model_1, row.judge) for row in rows}
    if len(sides) != 1:
        raise BenchmarkError(
            f"judgments of {len(sides)} pairs of models and judges; give those of one judge on one pair"
        )
    place = {prompt: at for at, prompt in enumerate(prompts)}
    groups: dict[int, list[Judgment]] = defaultdict(list)
    for row in rows:
        if row.instruction not in place:
            raise BenchmarkError(f"a judgment of a prompt that is not in the list: {row.instruction[:80]!r}")
        groups[place[row.instruction]].append(row)
    index = sorted(groups)
    first = [groups[at][0] for at in index]
    return Verdicts(
        *sides.pop(),
        index=np.array(index, np.int64),
        wins=np.array([_mean_win(groups[at]) for at in index], np.float64),
        lengths=np.array([row.length_2 for row in first], np.float64),
        opponent_lengths=np.array([row.length_1 for row in first], np.float64),
    )


def _mean_win(rows: Sequence[Judgment]) -> float:
    return float(np.mean([math.nan if row.preference is None else row.preference - 1 for row in rows]))

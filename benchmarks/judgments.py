"""Do the intervals of judged win rates cover the true value, and how do they change with a judge who likes length?

Simulated pairs of models are judged on 805 prompts. Prompts differ in difficulty, verdicts on a prompt are correlated between both
models, and the preference for longer answers is not the tanh(length) of the regression, as on real data. The true value of a figure
is the result of the same estimator on 60,000 prompts of the same pair. With `--data`, a folder with alpaca-eval's files (see
`docs/benchmarks.md`), real annotations are scored as well.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

# Small matrices: a thread per core costs more than it brings, and on a busy machine ten times more.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks.result import TARGET_HEADER, report, table, target
from expo_ray.benchmark.alpaca_eval.length_control import (
    GamedRows,
    LengthControl,
    Regression,
    controlled_win_rate,
    rejudged_control,
)
from expo_ray.benchmark.alpaca_eval.win_rates import compare_arms, score_arm
from expo_ray.benchmark.head_to_head import head_to_head
from expo_ray.benchmark.intervals import mean_of
from expo_ray.benchmark.judges.verdicts import Verdicts
from expo_ray.evaluation.statistics import Array
from expo_ray.report.results import Interval

PROMPTS, POPULATION = 805, 60_000
FIGURES = (
    "win rate of an arm",
    "LC win rate of an arm",
    "difference of win rates",
    "difference of LC win rates",
    "head to head, win rate",
    "head to head, LC win rate",
)


@dataclass(frozen=True)
class Population:
    """Parameters of a simulated pair and of the judge's preferences.

    Attributes:
        quality: log-odds of dpo's and + ExPO's answers against the baseline's.
        growth: log of the ratio of lengths, + ExPO's answers over dpo's.
        liking: log-odds that an answer gains per unit of log length.
    """

    quality: tuple[float, float]
    growth: float
    liking: float

    def draw(self, number: int, generator: np.random.Generator) -> tuple[Array, Verdicts, Verdicts, Verdicts]:
        """Draw difficulties of `number` prompts, verdicts of dpo and + ExPO against the baseline, and of + ExPO against dpo."""
        difficulty = generator.normal(0, 0.8, number)
        baseline = np.exp(generator.normal(7.4, 0.6, number))
        dpo = np.exp(0.6 * np.log(baseline) + 2.7 + generator.normal(0, 0.4, number))
        expo = dpo * np.exp(self.growth + generator.normal(0, 0.25, number))
        shared, noise = generator.normal(0, 1.2, number), generator.normal(0, 0.8, (2, number))
        value = [
            quality + difficulty + shared + each + self.liking * (np.log(length) - np.log(baseline))
            for quality, each, length in zip(self.quality, noise, (dpo, expo), strict=True)
        ]
        arms = [
            _verdicts(odds, length, baseline, generator)
            for odds, length in zip(value, (dpo, expo), strict=True)
        ]
        return difficulty, arms[0], arms[1], _verdicts(value[1] - value[0], expo, dpo, generator)


def _verdicts(log_odds: Array, lengths: Array, opponent: Array, generator: np.random.Generator) -> Verdicts:
    """Draw verdicts as decisive as GPT-4's: most are close to 0 or 1."""
    wins = 1 / (1 + np.exp(-3 * (log_odds + generator.logistic(0, 1, len(log_odds)))))
    index = np.arange(len(wins), dtype=np.int64)
    return Verdicts("model", "baseline", "judge", index, wins, np.round(lengths), np.round(opponent))


def gamed_rows(difficulty: Array, generator: np.random.Generator, liking: float) -> GamedRows:
    """Draw a judge's verdicts on a concise and a verbose baseline."""
    number = len(difficulty)
    baseline = np.exp(generator.normal(7.4, 0.6, number))
    gamed = [
        _verdicts(
            np.full(number, liking * np.log(factor)) + difficulty, baseline * factor, baseline, generator
        )
        for factor in (0.4, 1.7)
    ]
    rows = rejudged_control(gamed, difficulty).gamed
    assert rows is not None
    return rows


def covered(seed: int) -> list[bool]:
    """Draw a pair and check for each of `FIGURES` if its interval contains the true value."""
    generator = np.random.default_rng([7, seed])
    quality = generator.uniform(-3, 0.5)
    population = Population(
        (quality, quality + generator.normal(0.15, 0.2)),
        generator.uniform(0, 0.3),
        generator.uniform(0.2, 1.2),
    )
    gamed = gamed_rows(generator.normal(0, 0.8, PROMPTS), generator, population.liking)
    truth = _truth(population, gamed, generator)
    intervals = _intervals(population, gamed, generator)
    return [interval.low <= value <= interval.high for interval, value in zip(intervals, truth, strict=True)]


def _intervals(population: Population, gamed: GamedRows, generator: np.random.Generator) -> list[Interval]:
    difficulty, dpo, expo, duel = population.draw(PROMPTS, generator)
    control = LengthControl("rejudge", difficulty, gamed)
    arms = [score_arm(arm, control) for arm in (dpo, expo)]
    difference, direct = compare_arms(arms[1], arms[0], control), head_to_head(duel)
    figures = (
        arms[1].win_rate,
        arms[1].controlled,
        difference.win_rate,
        difference.controlled,
        direct.win_rate,
        direct.controlled,
    )
    return [figure.interval for figure in figures if figure is not None]


def _truth(population: Population, gamed: GamedRows, generator: np.random.Generator) -> list[float]:
    difficulty, dpo, expo, duel = population.draw(POPULATION, generator)
    # Scale the weight of the population to 805 prompts, so that the gamed rows have the same weight as in the sample.
    counts = np.full((1, POPULATION), PROMPTS / POPULATION)
    control = LengthControl("rejudge", difficulty, gamed)
    raw = [float(mean_of(100 * arm.wins)(counts)[0]) for arm in (dpo, expo, duel)]
    controlled = [float(controlled_win_rate(arm, control)(counts)[0]) for arm in (dpo, expo)]
    direct = 100 * float(Regression(duel.lengths - duel.opponent_lengths, duel.wins).win_rates(counts)[0])
    return [raw[1], controlled[1], raw[1] - raw[0], controlled[1] - controlled[0], raw[2], direct]


def coverage(pairs: int, processes: int) -> dict[str, float]:
    """Share of simulated pairs whose interval contains the true value, by figure."""
    with ProcessPoolExecutor(processes) as pool:
        rows = list(pool.map(covered, range(pairs), chunksize=5))
    return dict(zip(FIGURES, np.mean(rows, axis=0).tolist(), strict=True))


def coverage_section(shares: Mapping[str, float], pairs: int) -> Sequence[str]:
    """Section with the share and target of each figure."""
    rows = [target(name, 100 * share, 92, at_most=False, unit=" %") for name, share in shares.items()]
    text = f"Share of {pairs} simulated pairs, 805 prompts each, whose nominal 95 % interval holds the true value:"
    return [text, table(TARGET_HEADER, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", metavar="DIR", help="score real annotations and outputs as well")
    parser.add_argument("--quick", action="store_true", help="20 pairs, to see that it runs; not kept")
    given = parser.parse_args()
    pairs = 20 if given.quick else given.pairs
    sections = [*coverage_section(coverage(pairs, given.processes), pairs)]
    if given.data:
        from benchmarks.real_judgments import sections_of

        sections += sections_of(given.data)
    report(
        "judgments",
        "Judged win rates: intervals, and judges who like length",
        sections,
        packages=("numpy", "alpaca-eval", "scikit-learn"),
        keep=not given.quick,
    )


if __name__ == "__main__":
    main()

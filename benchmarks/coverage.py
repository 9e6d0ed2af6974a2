"""How often do intervals of gains cover the truth?

For each kind of paired difference and each number of prompts, samples are drawn whose true mean is known, and intervals are computed by
several methods. The last of them is that of `statistics.gain`, which the search shows and decides by.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.on_all_cores import on_all_cores
from benchmarks.result import TARGET_HEADER, report, table, target
from expo_ray.evaluation.statistics import (
    Array,
    Clusters,
    bca,
    gain,
    length_controlled_gain,
    resample_counts,
    student_margin,
    student_quantile,
)
from expo_ray.report.results import Interval

Draw = Callable[[np.random.Generator, int], Array]
SIZES = (48, 64, 96, 128, 256, 512)
CONFIDENCE = 0.95
# Of these, a studentised replicate is beyond any use: nearly all of its prompts are the same.
_LARGEST_STUDENTISED = 1e3
# Between the logarithm of the length and the reward.
_SLOPE = 3.0


@dataclass(frozen=True)
class Kind:
    """A distribution of paired differences, and its true mean."""

    draw: Draw
    mean: float = 0.0


def _differing(wins: float, losses: float) -> Kind:
    """Differences of 0/1 rewards."""

    def draw(generator: np.random.Generator, size: int) -> Array:
        at = generator.uniform(size=size)
        return (at < wins).astype(np.float64) - (at > 1 - losses)

    return Kind(draw, wins - losses)


def _collapsing(rate: float, depth: float = 20.0) -> Kind:
    """Normal differences, and rare collapses that take away as much as the others gain."""

    def draw(generator: np.random.Generator, size: int) -> Array:
        collapsed = generator.uniform(size=size) < rate
        return generator.normal(0, 2.1, size) + depth * (rate - collapsed)

    return Kind(draw)


KINDS: Mapping[str, Kind] = {
    "normal": Kind(lambda generator, size: generator.standard_normal(size)),
    "t, 3 degrees of freedom": Kind(lambda generator, size: generator.standard_t(3, size)),
    "skewed to the left (exponential)": Kind(lambda generator, size: 1 - generator.exponential(1, size)),
    "0/1, 10 % differ": _differing(0.06, 0.04),
    "0/1, 40 % differ": _differing(0.25, 0.15),
    "0/1 rewards themselves, 90 % are 1": _differing(0.9, 0.0),
    "3 % collapse by 20": _collapsing(0.03),
    "1.5 % collapse by 20": _collapsing(0.015),
    "0.5 % collapse by 20": _collapsing(0.005),
}


@dataclass
class Misses:
    """Samples, and how many intervals lay wholly above or below the truth."""

    samples: int = 0
    above: int = 0
    below: int = 0

    def count(self, interval: tuple[float, float], truth: float) -> None:
        self.samples += 1
        self.above += interval[0] > truth
        self.below += interval[1] < truth

    @property
    def coverage(self) -> float:
        return 1 - (self.above + self.below) / self.samples


def _bca(differences: Array, replicates: Array) -> tuple[float, float]:
    total, size = differences.sum(), len(differences)
    interval = bca(total / size, replicates, (total - differences) / (size - 1), CONFIDENCE)
    return interval.low, interval.high


def _student(differences: Array) -> tuple[float, float]:
    size = len(differences)
    margin = student_quantile(0.5 + CONFIDENCE / 2, size - 1) * differences.std(ddof=1) / math.sqrt(size)
    return differences.mean() - margin, differences.mean() + margin


def _with_unseen(differences: Array) -> tuple[float, float]:
    size = len(differences)
    margin = student_margin(float(differences.std(ddof=1)) / math.sqrt(size), size, CONFIDENCE)
    return differences.mean() - margin, differences.mean() + margin


def _studentised(differences: Array, means: Array, squares: Array) -> tuple[float, float]:
    """Bootstrap-t: the quantiles of the resamples' own t values."""
    size, mean = len(differences), differences.mean()
    errors = np.sqrt(np.maximum(squares - (means - mean) ** 2, 0) / (size - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((means - mean) / errors)
    low, high = np.quantile(np.clip(t, -_LARGEST_STUDENTISED, _LARGEST_STUDENTISED), [0.025, 0.975])
    error = differences.std(ddof=1) / math.sqrt(size)
    return mean - high * error, mean - low * error


def _wider(*intervals: tuple[float, float]) -> tuple[float, float]:
    return min(interval[0] for interval in intervals), max(interval[1] for interval in intervals)


SHOWN = "wider of BCa and t with two unseen prompts: shown and decided by"
METHODS = ("BCa", "t", "studentised bootstrap", "wider of BCa and t", "wider of all three", SHOWN)


def misses_of(task: tuple[str, int, int]) -> Mapping[str, Misses]:
    """Draw samples of a kind, of a size and number, and count what the intervals of each method miss."""
    name, size, samples = task
    kind = KINDS[name]
    generator = np.random.default_rng([20_240_501, size, round(1e6 * kind.mean)])
    counts = resample_counts(size).astype(np.float32)
    misses = {method: Misses() for method in METHODS}
    for _ in range(0, samples, 50):
        drawn = np.stack([kind.draw(generator, size) for _ in range(50)], axis=1)
        centred = (drawn - drawn.mean(axis=0)).astype(np.float32)
        means = drawn.mean(axis=0) + np.asarray(counts @ centred, np.float64) / size
        squares = np.asarray(counts @ centred**2, np.float64) / size
        for column in range(50):
            differences = drawn[:, column]
            single = (
                _bca(differences, means[:, column]),
                _student(differences),
                _studentised(differences, means[:, column], squares[:, column]),
            )
            shown = _wider(single[0], _with_unseen(differences))
            intervals = (*single, _wider(*single[:2]), _wider(*single), shown)
            for method, interval in zip(METHODS, intervals, strict=True):
                misses[method].count(interval, kind.mean)
    return misses


def clustered(task: tuple[int, int, int]) -> tuple[Misses, Misses]:
    """Near-duplicates, so many to a cluster, with an intra-cluster correlation of 0.3: intervals over prompts, and over clusters."""
    per_cluster, size, samples = task
    generator = np.random.default_rng([20_240_502, size, per_cluster])
    labels: Clusters = np.arange(size) // per_cluster
    over_prompts, over_clusters = Misses(), Misses()
    for _ in range(samples):
        shared = generator.normal(0, math.sqrt(0.3), labels.max() + 1)[labels]
        differences = shared + generator.normal(0, math.sqrt(0.7), size)
        zero = np.zeros(size)
        over_prompts.count(_ends(gain(differences, zero)), 0.0)
        over_clusters.count(_ends(gain(differences, zero, clusters=labels)), 0.0)
    return over_prompts, over_clusters


def length_controlled(task: tuple[int, int]) -> Misses:
    """The gain at dpo's length, where differences in reward are half made of length, and skewed."""
    size, samples = task
    generator = np.random.default_rng([20_240_503, size])
    misses = Misses()
    for _ in range(samples):
        dpo_lengths = generator.integers(20, 400, size).astype(np.float64)
        lengths = np.round(dpo_lengths * np.exp(generator.normal(0.2, 0.3, size)))
        longer = np.log1p(lengths) - np.log1p(dpo_lengths)
        rewards = 0.5 + _SLOPE * longer + generator.exponential(1, size) - 1
        interval = length_controlled_gain(rewards, np.zeros(size), lengths, dpo_lengths)
        misses.count(_ends(interval), 0.5)
    return misses


def _ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="100 samples of each kind; the result is not kept"
    )
    parser.add_argument("--samples", type=int, default=2000, help="of each kind (%(default)s)")
    arguments = parser.parse_args()
    samples = 100 if arguments.quick else arguments.samples
    cells = [(name, size) for name in KINDS for size in SIZES]
    misses = dict(zip(cells, on_all_cores(misses_of, [(*cell, samples) for cell in cells]), strict=True))
    by_kind = {name: {size: misses[name, size] for size in SIZES} for name in KINDS}
    near = [(per, size) for per in (3, 10) for size in SIZES if size // per >= 16]
    clusters = dict(zip(near, on_all_cores(clustered, [(*cell, samples) for cell in near]), strict=True))
    controlled = dict(
        zip(SIZES, on_all_cores(length_controlled, [(size, samples) for size in SIZES]), strict=True)
    )
    report(
        "coverage",
        "How often do intervals of gains cover the truth?",
        sections(by_kind, clusters, controlled, samples),
        packages=("numpy",),
        keep=not arguments.quick,
    )


def sections(
    by_kind: Mapping[str, Mapping[int, Mapping[str, Misses]]],
    clusters: Mapping[tuple[int, int], tuple[Misses, Misses]],
    controlled: Mapping[int, Misses],
    samples: int,
) -> Sequence[str]:
    cells = [
        table(
            ("", *(f"n = {size}" for size in SIZES)),
            [(name, *(_cell(by_size[size][method]) for size in SIZES)) for name, by_size in by_kind.items()],
        )
        for method in METHODS
    ]
    error = 100 * math.sqrt(0.95 * 0.05 / samples)
    return [
        f"Coverage of two-sided intervals at nominal 95 %, over {samples:,} samples each (standard error {error:.1f} points); in brackets, the "
        "share whose lower end lies above the truth, nominal 2.5 %.",
        *(f"## {method}\n\n{cell}" for method, cell in zip(METHODS, cells, strict=True)),
        "## Near-duplicates, intra-cluster correlation 0.3, the interval that is shown\n\n"
        + table(
            ("", "prompts", "resampled by prompt", "by cluster"),
            [
                (f"{per_cluster} to a cluster", size, *map(_cell, pair))
                for (per_cluster, size), pair in clusters.items()
            ],
        ),
        "## The gain at dpo's length, the interval that is shown\n\n"
        + table(tuple(f"n = {size}" for size in SIZES), [tuple(_cell(controlled[size]) for size in SIZES)]),
        table(TARGET_HEADER, targets(by_kind, clusters, controlled)),
    ]


def _cell(misses: Misses) -> str:
    return f"{misses.coverage:.1%} ({misses.above / misses.samples:.1%})"


def targets(
    by_kind: Mapping[str, Mapping[int, Mapping[str, Misses]]],
    clusters: Mapping[tuple[int, int], tuple[Misses, Misses]],
    controlled: Mapping[int, Misses],
) -> Sequence[Sequence[str]]:
    lowest = {name: min(by_size[size][SHOWN].coverage for size in SIZES) for name, by_size in by_kind.items()}
    lowest["clusters"] = min(pair[1].coverage for pair in clusters.values())
    lowest["gain at dpo's length"] = min(misses.coverage for misses in controlled.values())
    return [
        target(f"{name}, lowest coverage of any n", 100 * value, 93, at_most=False, unit=" %")
        for name, value in lowest.items()
    ]


if __name__ == "__main__":
    main()

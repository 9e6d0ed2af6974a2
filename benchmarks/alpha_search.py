"""How good is the alpha that the search finds, at what price, against other ways to search?

Every way is asked about the same synthetic pairs (`reward_curves.py`) and pays for the same responses. The ladder and the gridded searches
of `Search` run through `next_rung` and `decide`, as in the product. No guardrail trips here: the reward alone has to do.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

# Small matrices: a thread per core costs more than it brings, and on a busy machine ten times more.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks.result import TARGET_HEADER, report, table, target
from benchmarks.reward_curves import PROMPT_NOISE, RESIDUAL, Pair, draw, falling, flat, second
from expo_ray.config import Search
from expo_ray.evaluation.search.decision import decide
from expo_ray.evaluation.search.methods import next_rung

PAPERS_GRID = (0.1, 0.2, 0.3, 0.4, 0.5)
LOG_GRID = tuple(float(f"{alpha:.3g}") for alpha in np.geomspace(0.05, 20, 26))
# The constants of the search were tuned on seeds from 100,000 up, never on these.
FIRST_SEED = 0

Way = Callable[[Pair], float]


def by_search(settings: Search) -> Way:
    """The product's own search."""

    def choose(pair: Pair) -> float:
        while rung := next_rung(pair.history, settings):
            pair.evaluate(rung)
        return decide(pair.history, settings).alpha

    return choose


def by_highest_mean(alphas: Sequence[float]) -> Way:
    """Every alpha, and dpo, on all prompts; the highest mean wins, as in the paper."""
    return lambda pair: max((0.0, *alphas), key=pair.mean)


def golden_section(pair: Pair) -> float:
    """On log alpha from 0.05 to 20, to a factor of 1.2; the highest mean that was seen wins, dpo's among them."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(0.05), math.log(20)
    seen = {0.0: pair.mean(0.0)}

    def ask(at: float) -> float:
        alpha = math.exp(at)
        seen[alpha] = pair.mean(alpha)
        return seen[alpha]

    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = ask(left), ask(right)
    while high - low > math.log(1.2):
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = ask(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = ask(right)
    return max(seen, key=lambda alpha: seen[alpha])


LADDER = "ladder"
WAYS: Mapping[str, Way] = {
    LADDER: by_search(Search()),
    "grid 0.1 to 0.5, confirmed": by_search(Search(method="grid", alphas=PAPERS_GRID)),
    "grid 0.1 to 0.5, highest mean": by_highest_mean(PAPERS_GRID),
    "26-point log grid, highest mean": by_highest_mean(LOG_GRID),
    "golden section, highest mean": golden_section,
}
TWO_MODELS = "two reward models"
KINDS: Mapping[str, Callable[[int], Pair]] = {
    "with a gain": lambda seed: Pair(draw(seed), seed),
    "flat": lambda seed: Pair(flat(seed), seed),
    "falling": lambda seed: Pair(falling(seed), seed),
    TWO_MODELS: lambda seed: Pair(draw(seed), seed, second(seed)),
}


@dataclass(frozen=True)
class Outcome:
    """Result of a search method on a pair: the chosen alpha, its true gain, the largest gain of any alpha, and responses spent."""

    alpha: float
    gain: float
    attainable: float
    generations: int

    @property
    def regret(self) -> float:
        return 1 - self.gain / self.attainable


def run_task(task: tuple[str, str, int]) -> Outcome:
    """Run a search method on a synthetic pair of a kind and seed."""
    way, kind, seed = task
    pair = KINDS[kind](seed)
    alpha = WAYS[way](pair)
    return Outcome(alpha, pair.gain(alpha), pair.attainable(), pair.history.generations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 curves of each kind; the result is not kept")
    parser.add_argument("--curves", type=int, default=500, help="of each kind (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="of the curves (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="(%(default)s)")
    arguments = parser.parse_args()
    count = 20 if arguments.quick else arguments.curves
    tasks = [
        (way, kind, seed)
        for way in WAYS
        for kind in KINDS
        for seed in range(arguments.first_seed, arguments.first_seed + count)
    ]
    with ProcessPoolExecutor(arguments.processes) as pool:
        outcomes = list(pool.map(run_task, tasks, chunksize=20))
    by_way: dict[tuple[str, str], list[Outcome]] = {}
    for (way, kind, _), outcome in zip(tasks, outcomes, strict=True):
        by_way.setdefault((way, kind), []).append(outcome)
    report(
        "alpha_search",
        "Choosing alpha: how good, and at what price?",
        sections(by_way, count, arguments.first_seed),
        packages=("numpy",),
        keep=not arguments.quick and arguments.first_seed == FIRST_SEED,
    )


def sections(
    by_way: Mapping[tuple[str, str], Sequence[Outcome]], count: int, first_seed: int
) -> Sequence[str]:
    return [
        f"{count} curves of each kind, seeds from {first_seed}; the search was tuned on seeds from 100,000. With a gain: a rise up to an alpha "
        "that is log-uniform in 0.1 to 10, a fall, and a cliff at 1.5 to 4 times that alpha; the largest gain is log-uniform in about 0.3 to 3 "
        f"rewards, with standard deviations of {PROMPT_NOISE:g} between prompts (the same for every alpha) and {RESIDUAL:g} of each response. "
        "So a gain of 0.3 is one seventh of the standard deviation of a paired difference, 2.1. 1,000 prompts to choose on, 1,000 to confirm "
        "on; one response each. Generations count dpo's, and the confirmation's.",
        table(HEADER, [row(way, by_way[way, "with a gain"]) for way in WAYS]),
        "Regret is the share of the largest gain of the curve that the decision misses; 100 % is dpo. By the size of that gain, for the ladder:",
        table(
            ("largest gain", "curves", "median regret", "mean regret", "dpo kept"),
            [by_size(by_way[LADDER, "with a gain"], *bounds) for bounds in ((0, 0.6), (0.6, 1.2), (1.2, 9))],
        ),
        "Without any gain (flat: as good as dpo up to a cliff; falling: worse from the beginning), share of decisions for an alpha above 0, and "
        "median generations:",
        table(
            ("", "flat", "generations", "falling", "generations"),
            [
                (way, *(cell for kind in ("flat", "falling") for cell in null(by_way[way, kind])))
                for way in WAYS
            ],
        ),
        "With a second reward model, whose turn comes 1 to 8 times as early, log-uniform, and whose gain is of the same kind: the attainable gain "
        "is the first model's where the second one's is not below 0, and an alpha that the second one finds worse than dpo is worse than dpo. "
        "The searches that only compare means know the first model alone:",
        table(HEADER, [row(way, by_way[way, TWO_MODELS]) for way in WAYS]),
        table(TARGET_HEADER, targets(by_way)),
    ]


HEADER = (
    "", "median regret", "mean regret", "90th percentile", "worse than dpo", "dpo kept", "generations, median", "mean", "most",
)  # fmt: skip


def row(way: str, outcomes: Sequence[Outcome]) -> Sequence[str]:
    regrets = np.array([outcome.regret for outcome in outcomes])
    generations = np.array([outcome.generations for outcome in outcomes])
    return (
        way,
        f"{np.median(regrets):.1%}",
        f"{regrets.mean():.1%}",
        f"{np.quantile(regrets, 0.9):.1%}",
        f"{np.mean([outcome.gain < 0 for outcome in outcomes]):.1%}",
        f"{np.mean([outcome.alpha == 0 for outcome in outcomes]):.1%}",
        f"{np.median(generations):,.0f}",
        f"{generations.mean():,.0f}",
        f"{generations.max():,}",
    )


def by_size(outcomes: Sequence[Outcome], low: float, high: float) -> Sequence[str]:
    chosen = [outcome for outcome in outcomes if low <= outcome.attainable < high]
    regrets = [outcome.regret for outcome in chosen] or [math.nan]
    name = f"below {high:g}" if not low else f"{low:g} to {high:g}" if high < 9 else f"{low:g} and more"
    kept = np.mean([float(outcome.alpha == 0) for outcome in chosen] or [math.nan])
    return name, str(len(chosen)), f"{np.median(regrets):.1%}", f"{np.mean(regrets):.1%}", f"{kept:.1%}"


def null(outcomes: Sequence[Outcome]) -> Sequence[str]:
    wrong = np.mean([outcome.alpha > 0 for outcome in outcomes])
    return f"{wrong:.1%}", f"{np.median([outcome.generations for outcome in outcomes]):,.0f}"


def targets(by_way: Mapping[tuple[str, str], Sequence[Outcome]]) -> Sequence[Sequence[str]]:
    hills = by_way[LADDER, "with a gain"]
    worse = float(np.mean([outcome.gain < 0 for outcome in hills]))
    wrong = [
        float(np.mean([outcome.alpha > 0 for outcome in by_way[LADDER, kind]]))
        for kind in ("flat", "falling")
    ]
    return [
        target("median regret", 100 * float(np.median([outcome.regret for outcome in hills])), 3, unit=" %"),
        target("decisions worse than dpo", 100 * worse, 1, unit=" %"),
        target(
            "generations, the most of any curve",
            max(outcome.generations for outcome in hills) / 1000,
            6,
            unit=" thousand",
        ),
        target("alpha above 0 on curves without a gain, the worse kind", 100 * max(wrong), 5, unit=" %"),
    ]


if __name__ == "__main__":
    main()

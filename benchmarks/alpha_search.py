"""How good is the alpha that the search finds, at what price, against other ways to search?

Every way is asked about the same synthetic pairs (`reward_curves.py`) and pays for the same responses. The searches of the product run
through `next_rung` and `decide`, as they do there. No guardrail trips on the first family; on the held-out one, the length ratio may.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from benchmarks.held_out_curves import KINDS as HELD_OUT_KINDS
from benchmarks.held_out_curves import HeldOutPair
from benchmarks.on_all_cores import on_all_cores
from benchmarks.result import TARGET_HEADER, report, table, target
from benchmarks.reward_curves import (
    BOTH_GAIN,
    PROMPT_NOISE,
    RESIDUAL,
    AnsweredPair,
    HeldOut,
    Pair,
    draw,
    falling,
    flat,
    second,
)
from expo_ray.config import Search
from expo_ray.evaluation.search.decision import decide
from expo_ray.evaluation.search.methods import next_rung

PAPERS_GRID = (0.1, 0.2, 0.3, 0.4, 0.5)
LOG_GRID = tuple(float(f"{alpha:.3g}") for alpha in np.geomspace(0.05, 20, 26))
# The constants of the search were tuned on seeds from 100,000 up, never on these.
FIRST_SEED = 0

Way = Callable[[AnsweredPair], float]


def by_search(settings: Search) -> Way:
    """The product's own search."""

    def choose(pair: AnsweredPair) -> float:
        while rung := next_rung(pair.history, settings):
            pair.evaluate(rung)
        return decide(pair.history, settings).alpha

    return choose


def by_highest_mean(alphas: Sequence[float]) -> Way:
    """Every alpha, and dpo, on all prompts; the highest mean wins, as in the paper."""
    return lambda pair: max((0.0, *alphas), key=pair.mean)


def golden_section(pair: AnsweredPair) -> float:
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


SURFACE, LADDER = "surface", "ladder"
FAIR_GRID = "26-point log grid, 128 prompts, confirmed"
FULL_GRID = "26-point log grid, highest mean"
WAYS: Mapping[str, Way] = {
    SURFACE: by_search(Search(method="surface")),
    LADDER: by_search(Search(method="ladder")),
    FAIR_GRID: by_search(Search(method="grid", alphas=LOG_GRID, prompts=(128,))),
    FULL_GRID: by_highest_mean(LOG_GRID),
    "grid 0.1 to 0.5, confirmed": by_search(Search(method="grid", alphas=PAPERS_GRID)),
    "grid 0.1 to 0.5, highest mean": by_highest_mean(PAPERS_GRID),
    "golden section, highest mean": golden_section,
}
# On the held-out family, whose kinds are many.
COMPARED = (SURFACE, LADDER, FAIR_GRID, FULL_GRID)
GAIN, NULLS, TWO_MODELS = "with a gain", ("flat", "falling"), "two reward models"
KINDS: Mapping[str, Callable[[int], AnsweredPair]] = {
    GAIN: lambda seed: Pair(draw(seed), seed),
    NULLS[0]: lambda seed: Pair(flat(seed), seed),
    NULLS[1]: lambda seed: Pair(falling(seed), seed),
    TWO_MODELS: lambda seed: Pair(draw(seed), seed, second(seed), BOTH_GAIN),
}
BOUGHT = "bought with length"


def pair_of(kind: str, seed: int) -> AnsweredPair:
    """The pair of a kind: one of `KINDS`, or a held-out kind with `null: ` before it where it has no gain."""
    if kind in KINDS:
        return KINDS[kind](seed)
    return HeldOut(HeldOutPair(kind.removeprefix(_NULL), seed, null=kind.startswith(_NULL)))


_NULL = "null: "


@dataclass(frozen=True)
class Outcome:
    """Result of a search method on a pair.

    Attributes:
        alpha: the chosen one.
        gain: its true gain by the reward.
        worth: its true gain to a user.
        attainable: the largest gain of any alpha.
        generations: responses spent.
    """

    alpha: float
    gain: float
    worth: float
    attainable: float
    generations: int

    @property
    def regret(self) -> float:
        return 1 - self.gain / self.attainable


def run_task(task: tuple[str, str, int]) -> Outcome:
    """Run a search method on a synthetic pair of a kind and seed."""
    way, kind, seed = task
    pair = pair_of(kind, seed)
    alpha = WAYS[way](pair)
    return Outcome(alpha, pair.gain(alpha), pair.worth(alpha), pair.attainable(), pair.history.generations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 curves of each kind; the result is not kept")
    parser.add_argument(
        "--curves", type=int, default=500, help="of each kind of the first family (%(default)s)"
    )
    parser.add_argument(
        "--others", type=int, help="of the same curves for the methods beside `surface`, by default all"
    )
    parser.add_argument("--held-out", type=int, default=50, help="curves of each held-out kind (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="of the curves (%(default)s)")
    arguments = parser.parse_args()
    tuning = arguments.first_seed != FIRST_SEED
    count = 20 if arguments.quick else arguments.curves
    # Nothing is tuned on the held-out family, so tuning does not even see it.
    held_out = 0 if tuning else 2 if arguments.quick else arguments.held_out
    others = min(count, arguments.others or count)
    by_way = run_all(arguments.first_seed, count, others, held_out)
    report(
        "alpha_search",
        "Choosing alpha: how good, and at what price?",
        [
            *first_family(by_way, count, others, arguments.first_seed),
            *(second_family(by_way, held_out) if held_out else ()),
        ],
        packages=("numpy",),
        keep=not arguments.quick and not tuning,
    )


def run_all(
    first: int, count: int, others: int, held_out: int
) -> Mapping[tuple[str, str], Sequence[Outcome]]:
    """Run every way on every pair; the outcomes by way and kind."""
    tasks = [
        (way, kind, seed)
        for way in WAYS
        for kind in KINDS
        for seed in range(first, first + (count if way == SURFACE else others))
    ] + [
        (way, null + kind, seed)
        for way in COMPARED
        for null in ("", _NULL)
        for kind in HELD_OUT_KINDS
        for seed in range(held_out)
    ]
    outcomes = on_all_cores(run_task, tasks)
    by_way: dict[tuple[str, str], list[Outcome]] = {}
    for (way, kind, _), outcome in zip(tasks, outcomes, strict=True):
        by_way.setdefault((way, kind), []).append(outcome)
    return by_way


def first_family(
    by_way: Mapping[tuple[str, str], Sequence[Outcome]], count: int, others: int, first_seed: int
) -> Sequence[str]:
    return [
        f"## The first family\n\n{count} curves of each kind, seeds from {first_seed}, and the first {others} of them for the methods beside `surface`; it was tuned on seeds from 100,000. With a gain: a "
        "rise up to an alpha that is log-uniform in 0.1 to 10, a fall, and a cliff at 1.5 to 4 times that alpha; the largest gain is log-uniform "
        f"in about 0.3 to 3 rewards, with standard deviations of {PROMPT_NOISE:g} between prompts (the same for every alpha) and {RESIDUAL:g} of "
        "each response. So a gain of 0.3 is one seventh of the standard deviation of a paired difference, 2.1. 1,000 prompts to choose on, 1,000 "
        "to confirm on; one response each. Generations count dpo's, and the confirmation's.",
        table(HEADER, [row(way, by_way[way, GAIN]) for way in WAYS]),
        "Regret is the share of the largest gain of the curve that the decision misses; 100 % is dpo. `k of n (at most x %)` has the upper end of "
        "a one-sided 95 % interval. By the size of the largest gain:",
        table(
            ("", "largest gain", "curves", "median regret", "mean regret", "dpo kept", "generations, median"),
            [
                by_size(way, by_way[way, GAIN], *bounds)
                for way in (SURFACE, LADDER)
                for bounds in ((0, 0.6), (0.6, 1.2), (1.2, 9))
            ],
        ),
        "Without any gain (flat: as good as dpo up to a cliff; falling: worse from the beginning), decisions for an alpha above 0, and median "
        "generations:",
        table(
            ("", "flat", "generations", "falling", "generations"),
            [(way, *(cell for kind in NULLS for cell in null(by_way[way, kind]))) for way in WAYS],
        ),
        "With a second reward model, whose turn comes 1 to 8 times as early, log-uniform, and whose gain is of the same kind, and which has to confirm: the attainable gain "
        "is the first model's where the second one's is not below 0, and an alpha that the second one finds worse than dpo is worse than dpo. "
        "The searches that only compare means know the first model alone:",
        table(HEADER, [row(way, by_way[way, TWO_MODELS]) for way in WAYS]),
        table(TARGET_HEADER, targets(by_way)),
    ]


def second_family(by_way: Mapping[tuple[str, str], Sequence[Outcome]], count: int) -> Sequence[str]:
    together = {
        (way, null): [outcome for kind in HELD_OUT_KINDS for outcome in by_way[way, null + kind]]
        for way in COMPARED
        for null in ("", _NULL)
    }
    return [
        f"## The held-out family\n\n{count} curves of each of {len(HELD_OUT_KINDS)} kinds (`held_out_curves.py`), on which nothing was tuned. Worse "
        f"than dpo is a matter of quality, not of reward: where a gain is {BOUGHT}, every alpha with a higher reward is worse.",
        table(HEADER, [row(way, together[way, ""]) for way in COMPARED]),
        "Without a gain, of all kinds together:",
        table(
            ("", "alpha above 0", "generations, median"),
            [(way, *null(together[way, _NULL])) for way in COMPARED],
        ),
        "Median and mean regret by kind; dpo kept; and, without a gain, alpha above 0:",
        table(
            ("", *COMPARED),
            [(kind, *(by_kind(by_way, way, kind) for way in COMPARED)) for kind in HELD_OUT_KINDS],
        ),
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
        counted(outcome.worth < 0 for outcome in outcomes),
        counted(outcome.alpha == 0 for outcome in outcomes),
        f"{np.median(generations):,.0f}",
        f"{generations.mean():,.0f}",
        f"{generations.max():,}",
    )


def counted(cases: Iterable[bool]) -> str:
    """`3 of 500 (at most 1.5 %)`: the upper end of a one-sided 95 % interval (Clopper and Pearson 1934)."""
    listed = list(cases)
    number, of = sum(listed), len(listed)
    most = float(beta.ppf(0.95, number + 1, of - number)) if number < of else 1.0
    return f"{number} of {of} (at most {100 * most:.1f} %)"


def by_size(way: str, outcomes: Sequence[Outcome], low: float, high: float) -> Sequence[str]:
    chosen = [outcome for outcome in outcomes if low <= outcome.attainable < high]
    if not chosen:
        return (way, f"{low:g} to {high:g}", "0", "", "", "", "")
    regrets = [outcome.regret for outcome in chosen]
    name = f"below {high:g}" if not low else f"{low:g} to {high:g}" if high < 9 else f"{low:g} and more"
    return (
        way,
        name,
        str(len(chosen)),
        f"{np.median(regrets):.1%}",
        f"{np.mean(regrets):.1%}",
        counted(outcome.alpha == 0 for outcome in chosen),
        f"{np.median([outcome.generations for outcome in chosen]):,.0f}",
    )


def by_kind(by_way: Mapping[tuple[str, str], Sequence[Outcome]], way: str, kind: str) -> str:
    outcomes, nulls = by_way[way, kind], by_way[way, _NULL + kind]
    regrets = [outcome.regret for outcome in outcomes]
    kept, wrong = sum(outcome.alpha == 0 for outcome in outcomes), sum(outcome.alpha > 0 for outcome in nulls)
    return f"{np.median(regrets):.1%} / {np.mean(regrets):.1%}; {kept} of {len(outcomes)}; {wrong} of {len(nulls)}"


def null(outcomes: Sequence[Outcome]) -> Sequence[str]:
    generations = np.median([outcome.generations for outcome in outcomes])
    return counted(outcome.alpha > 0 for outcome in outcomes), f"{generations:,.0f}"


def targets(by_way: Mapping[tuple[str, str], Sequence[Outcome]]) -> Sequence[Sequence[str]]:
    hills, ladders = by_way[SURFACE, GAIN], by_way[LADDER, GAIN]
    regrets, generations = (
        [outcome.regret for outcome in hills],
        [outcome.generations / 1000 for outcome in hills],
    )
    wrong = [float(np.mean([outcome.alpha > 0 for outcome in by_way[SURFACE, kind]])) for kind in NULLS]
    common = [
        100 * float(np.median([outcome.regret for outcome in outcomes[: len(ladders)]]))
        for outcomes in (hills, ladders)
    ]
    return [
        target(
            "surface: median regret, against the ladder's on the same curves",
            common[0],
            round(common[1], 2),
            unit=" %",
        ),
        target("mean regret", 100 * float(np.mean(regrets)), 4, unit=" %"),
        target(
            "decisions worse than dpo",
            100 * float(np.mean([outcome.worth < 0 for outcome in hills])),
            1,
            unit=" %",
        ),
        target("generations, median", float(np.median(generations)), 1.7, unit=" thousand"),
        target("generations, mean", float(np.mean(generations)), 2.2, unit=" thousand"),
        target("alpha above 0 on curves without a gain, the worse kind", 100 * max(wrong), 1, unit=" %"),
    ]


if __name__ == "__main__":
    main()

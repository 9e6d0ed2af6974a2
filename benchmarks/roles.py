"""What do the roles of a second reward model refuse, and what harm do they let through?

The first model sees a pair of `reward_curves.py`. The second one sees another curve of the same pair, whose noise is as large, in seven
scenarios from agreement to hacking. Searches run as in `alpha_search.py`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.alpha_search import counted
from benchmarks.on_all_cores import on_all_cores
from benchmarks.result import report, table
from benchmarks.reward_curves import RESIDUAL, Curve, Pair, draw, second
from expo_ray.config import Search
from expo_ray.evaluation.search.decision import decide
from expo_ray.evaluation.search.methods import next_rung
from expo_ray.evaluation.search.roles import Criterion, Roles

# Standard deviation of a paired difference.
PAIRED = math.sqrt(2) * RESIDUAL
WORTH, LITTLE, HARM = 0.1 * PAIRED, 0.02 * PAIRED, 0.1 * PAIRED


@dataclass(frozen=True)
class SecondCurve:
    """Gain that the second model sees, as a function of alpha and of the first model's curve."""

    first: Curve
    scenario: str
    seed: int

    def gain(self, alpha: float) -> float:
        return SCENARIOS[self.scenario](self, alpha) if alpha > 0 else 0.0

    def fall(self, alpha: float) -> float:
        """What the first model's curve has lost since its turn."""
        return (
            min(0.0, self.first.gain(alpha) - self.first.gain(self.first.turn))
            if alpha > self.first.turn
            else 0.0
        )


SCENARIOS: Mapping[str, Callable[[SecondCurve, float], float]] = {
    "agrees": lambda curve, alpha: curve.first.gain(alpha),
    "sees half of it": lambda curve, alpha: 0.5 * curve.first.gain(alpha),
    "indifferent up to the fall": lambda curve, alpha: curve.fall(alpha),
    "turns 1 to 8 times earlier": lambda curve, alpha: second(curve.seed).gain(alpha),
    "loses 0.05 sd at the top": lambda curve, alpha: (
        curve.fall(alpha) - 0.05 * PAIRED * min(alpha / curve.first.turn, 1.0)
    ),
    "hacked late": lambda curve, alpha: max(
        0.5 * curve.first.height * (1 - (1 - alpha / (0.4 * curve.first.turn)) ** 2), -8.0
    ),
    "hacked from the start": lambda curve, alpha: -0.5 * curve.first.gain(alpha),
}
MODEL = "second"
SETTINGS: Mapping[str, tuple[Search, Roles]] = {
    "confirm": (Search(method="surface"), Roles({MODEL: Criterion("confirm")})),
    "guard 0.1": (Search(method="surface"), Roles({MODEL: Criterion("guard", 0.1)})),
    "guard 0.2": (Search(method="surface"), Roles({MODEL: Criterion("guard", 0.2)})),
    "joint": (
        Search(method="surface"),
        Roles({"reward": Criterion("joint"), MODEL: Criterion("joint")}, ("reward", MODEL)),
    ),
    "ladder, confirm": (Search(method="ladder"), Roles({MODEL: Criterion("confirm")})),
    "ladder, guard 0.1": (Search(method="ladder"), Roles({MODEL: Criterion("guard", 0.1)})),
}


@dataclass(frozen=True)
class Outcome:
    """Result of a search.

    Attributes:
        is_worth: some alpha has a gain worth finding by the first model that the second does not find harmful.
        share: of the largest such gain.
        loss: true loss of the chosen alpha by the second model.
    """

    alpha: float
    is_worth: bool
    share: float
    loss: float
    generations: int


def run_task(task: tuple[str, str, int]) -> Outcome:
    """Search a pair of a scenario with the roles of that name."""
    name, scenario, seed = task
    settings, roles = SETTINGS[name]
    first = draw(seed)
    other = SecondCurve(first, scenario, seed)
    pair = Pair(first, seed, other, roles)
    while rung := next_rung(pair.history, settings):
        pair.evaluate(rung)
    alpha = decide(pair.history, settings).alpha
    alphas = first.turn * np.geomspace(0.02, 2, 400)
    attainable = max(
        (first.gain(float(each)) for each in alphas if other.gain(float(each)) > -HARM), default=0.0
    )
    return Outcome(
        alpha,
        attainable >= WORTH,
        first.gain(alpha) / attainable if attainable > 0 else 0.0,
        -other.gain(alpha),
        pair.history.generations,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 pairs of each; the result is not kept")
    parser.add_argument("--pairs", type=int, default=280, help="of each scenario (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="of the pairs (%(default)s)")
    parser.add_argument(
        "--only", nargs="*", default=list(SETTINGS), help="these roles; the result is not kept"
    )
    arguments = parser.parse_args()
    count = 3 if arguments.quick else arguments.pairs
    seeds = range(arguments.first_seed, arguments.first_seed + count)
    tasks = [(name, scenario, seed) for name in arguments.only for scenario in SCENARIOS for seed in seeds]
    outcomes = on_all_cores(run_task, tasks)
    by_task: dict[tuple[str, str], list[Outcome]] = {}
    for (name, scenario, _), outcome in zip(tasks, outcomes, strict=True):
        by_task.setdefault((name, scenario), []).append(outcome)
    report(
        "roles",
        "Roles of a second reward model: what they refuse, and what harm they let through",
        sections(by_task, arguments.only, count, arguments.first_seed),
        packages=("numpy",),
        keep=not arguments.quick and len(arguments.only) == len(SETTINGS) and arguments.first_seed == 0,
    )


def sections(
    by_task: Mapping[tuple[str, str], Sequence[Outcome]], names: Sequence[str], count: int, first_seed: int
) -> Sequence[str]:
    return [
        f"{count} pairs of each scenario, seeds from {first_seed}, with `surface` unless the name says otherwise; 1,000 prompts to choose on and "
        f"1,000 to confirm on. Standard deviations (sd) are of a paired difference, {PAIRED:.2f} rewards.",
        "Refused: searches that keep dpo although some alpha gains at least 0.1 sd by the first model and loses at most 0.1 sd by the second:",
        table(("second model", *names), [(scenario, *(refused(by_task[name, scenario]) for name in names)) for scenario in SCENARIOS]),
        "Harm: the chosen alpha truly loses more than 0.02 sd / more than 0.1 sd by the second model:",
        table(("second model", *names), [(scenario, *(harmed(by_task[name, scenario]) for name in names)) for scenario in SCENARIOS]),
        "Gain by the first model, as a mean share of the largest one that the second does not find worse by more than 0.1 sd; more than 100 % is "
        "bought with harm. Then the responses of a search, median:",
        table(
            ("second model", *names),
            [(scenario, *(gained(by_task[name, scenario]) for name in names)) for scenario in SCENARIOS],
        ),
    ]  # fmt: skip


def refused(outcomes: Sequence[Outcome]) -> str:
    worth = [outcome for outcome in outcomes if outcome.is_worth]
    return counted(outcome.alpha == 0 for outcome in worth) if worth else "-"


def harmed(outcomes: Sequence[Outcome]) -> str:
    little, much = (sum(outcome.loss > limit for outcome in outcomes) for limit in (LITTLE, HARM))
    return f"{little} / {much} of {len(outcomes)}"


def gained(outcomes: Sequence[Outcome]) -> str:
    worth = [outcome for outcome in outcomes if outcome.is_worth]
    share = f"{np.mean([outcome.share for outcome in worth]):.0%}" if worth else "-"
    return f"{share}; {np.median([outcome.generations for outcome in outcomes]):,.0f}"


if __name__ == "__main__":
    main()

"""What should become of a gain that comes with longer responses? Rules for it, on gains that are bought and on honest ones.

Only the last test is simulated: one alpha against dpo on untouched prompts. A gain is confirmed if its lower bound is above zero; the rule
then may refuse it. No search, and no curve of `reward_curves.py` or `held_out_curves.py`, is involved.
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
from expo_ray.config import Guardrails
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.guardrails import bought_with_length
from expo_ray.evaluation.search.response_measures import RESPONSE_MEASURES
from expo_ray.evaluation.statistics import gain, length_controlled_gain
from expo_ray.report.results import Interval

PROMPTS = 512
# Standard deviations: of a response's reward, and of its log length around that of its prompt.
NOISE, SPREAD = 1.5, 0.3
PAIRED = math.sqrt(2) * NOISE
SIZES = (0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Kind:
    """Where a gain comes from.

    Attributes:
        bought: share of it that is length.
        within: slope within prompts, as a share of that between alphas. Where it is 0, no regression over prompts can see the purchase.
        longer: factor of the lengths; None for as much as the bought gain needs at 5 rewards for each e-fold.
    """

    bought: float
    within: float
    longer: float | None = None

    @property
    def is_worse(self) -> bool:
        """True for what a user would not want."""
        return self.bought > 0.75


KINDS: Mapping[str, Kind] = {
    "bought with length": Kind(1.0, 1.0),
    "bought, half of the slope within prompts": Kind(1.0, 0.5),
    "bought, no slope within prompts": Kind(1.0, 0.0),
    "honest, as long as dpo's": Kind(0.0, 0.0, 1.0),
    "honest, 10 % longer": Kind(0.0, 0.0, 1.1),
    "honest, 30 % longer": Kind(0.0, 0.0, 1.3),
    "honest, 10 % longer, a quarter of it length": Kind(0.25, 1.0, 1.1),
}
Rule = Callable[[Interval, Interval, AlphaScores, AlphaScores], bool]


def product(gained: Interval, left: Interval, scores: AlphaScores, dpo: AlphaScores) -> bool:
    return bought_with_length(scores, dpo, Guardrails().bought).verdict != "reject"


RULES: Mapping[str, Rule] = {
    "none": lambda *_: True,
    "estimate left above 0": lambda gained, left, *_: left.mean > 0,
    "half of the estimate left (product)": product,
    "three quarters of the estimate left": lambda gained, left, *_: (
        left.mean > 0.75 * gained.mean or left.low > 0
    ),
    "lower bound left above 0": lambda gained, left, *_: left.low > 0,
}


def draw(kind: Kind, size: float, seed: int) -> tuple[AlphaScores, AlphaScores]:
    """Scores of an alpha and of dpo, whose true gain is `size` standard deviations of a paired difference."""
    generator = np.random.default_rng([seed, round(100 * size), sum(map(ord, str(kind)))])
    true = size * PAIRED
    growth = kind.bought * true / 5 if kind.longer is None else math.log(kind.longer)
    slope = kind.within * kind.bought * true / growth if growth else 0.0
    ease = generator.normal(0, 2, PROMPTS)
    noise = generator.normal(0, SPREAD, (2, PROMPTS))
    rewards = ease + slope * noise + generator.normal(0, NOISE, (2, PROMPTS))
    rewards[1] += true
    lengths = 200 * np.exp(noise + np.array([[0.0], [growth]]))
    ids = tuple(map(str, range(PROMPTS)))
    zero = dict.fromkeys(RESPONSE_MEASURES, np.zeros(PROMPTS))
    dpo, alpha = (
        AlphaScores(float(number), ids, {"reward": rewards[number]}, lengths[number], zero)
        for number in (0, 1)
    )
    return alpha, dpo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 pairs of each; the result is not kept")
    parser.add_argument("--pairs", type=int, default=280, help="of each kind and size (%(default)s)")
    arguments = parser.parse_args()
    count = 10 if arguments.quick else arguments.pairs
    cells = [(kind, size) for kind in KINDS for size in SIZES]
    rows = on_all_cores(publish, [(*cell, seed) for cell in cells for seed in range(count)])
    published = {
        cell: {rule: [row[rule] for row in rows[at * count : (at + 1) * count]] for rule in RULES}
        for at, cell in enumerate(cells)
    }
    report(
        "length_rule",
        "A gain that comes with longer responses",
        [
            f"{count} pairs of each kind and size, {PROMPTS} untouched prompts; the gain is {', '.join(f'{size:g}' for size in SIZES)} standard "
            "deviations of a paired difference. Bought gains grow lengths by a factor of e for each 5 rewards. A rule is asked where lengths differ "
            "by more than 5 %, once the gain is confirmed. Published, of all sizes together:",
            table(
                ("", *RULES),
                [(kind, *(counted(case for size in SIZES for case in published[kind, size][rule]) for rule in RULES)) for kind in KINDS],
            ),
            "By size, published with no rule and with the product's:",
            table(
                ("", *(f"{size:g}" for size in SIZES)),
                [
                    (kind, *(two_rules(published[kind, size]) for size in SIZES)) for kind in KINDS
                ],
            ),
        ],
        packages=("numpy",),
        keep=not arguments.quick,
    )  # fmt: skip


def publish(task: tuple[str, float, int]) -> Mapping[str, bool]:
    """By rule, whether it publishes the pair of a kind, size and seed."""
    kind, size, seed = task
    scores, dpo = draw(KINDS[kind], size, seed)
    rewards, of_dpo = scores.rewards["reward"], dpo.rewards["reward"]
    gained = gain(rewards, of_dpo)
    left = length_controlled_gain(rewards, of_dpo, scores.lengths, dpo.lengths)
    as_long = abs(math.log(scores.lengths.mean() / dpo.lengths.mean())) <= math.log(1.05)
    return {
        name: bool(gained.low > 0 and (as_long or rule(gained, left, scores, dpo)))
        for name, rule in RULES.items()
    }


def two_rules(published: Mapping[str, Sequence[bool]]) -> str:
    return " / ".join(
        f"{np.mean(published[rule]):.0%}" for rule in ("none", "half of the estimate left (product)")
    )


if __name__ == "__main__":
    main()

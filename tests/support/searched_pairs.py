"""A pair whose rewards follow curves, searched without an engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from expo_ray.config import Search
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.decision import Decision, decide
from expo_ray.evaluation.search.history import HALF_NAMES, Half, History, Rung
from expo_ray.evaluation.search.methods import next_rung
from expo_ray.evaluation.search.roles import DEFAULT_ROLES, Criterion, Roles
from expo_ray.report.results import HalfName, Measurement
from tests.support.scores import scores_of

Curve = Callable[[float], float]
# Both reward models have to see a gain.
BOTH_GAIN = Roles({"rm1": Criterion("confirm")})


class Pair:
    """A pair whose rewards follow curves: the same prompts for every alpha, noise of each response, and no engine."""

    def __init__(
        self,
        *curves: Curve,
        halves: tuple[int, int] = (1000, 1000),
        noise: float = 1.5,
        seed: int = 0,
        length: Curve = lambda alpha: 200,
        roles: Roles = DEFAULT_ROLES,
    ) -> None:
        self.curves, self.noise, self.seed, self.length = curves, noise, seed, length
        choose, confirm = (
            Half(tuple(f"{name}-{number}" for number in range(count)), {}, roles)
            for name, count in zip(HALF_NAMES, halves, strict=True)
        )
        self.history = History(choose, confirm)
        self.asked: list[Rung] = []

    def evaluate(self, rung: Rung) -> None:
        """As the pipeline does: each alpha that is missing, on the prompts asked for."""
        half = self.history.half(rung.half)
        scores = {
            alpha: self.respond(rung.half, alpha, half.num_prompts).on(
                half.prompt_ids[rung.start : rung.stop]
            )
            for alpha in half.missing(rung)
        }
        self.history = self.history.with_scores(rung.half, scores)

    def respond(self, half: HalfName, alpha: float, count: int) -> AlphaScores:
        side = 0 if half == "choose" else 1
        ease = np.random.default_rng([self.seed, side]).normal(0, 2, count)
        generator = np.random.default_rng([self.seed, side, round((alpha + 1) * 1e6)])
        return scores_of(
            alpha,
            [f"{half}-{number}" for number in range(count)],
            {
                f"rm{number}": ease + curve(alpha) + generator.normal(0, self.noise, count)
                for number, curve in enumerate(self.curves)
            },
            length=self.length(alpha),
        )

    def search(self, settings: Search) -> Decision:
        while rung := next_rung(self.history, settings):
            self.asked.append(rung)
            assert self.history.half(rung.half).missing(rung)
            assert 0 <= rung.start < rung.stop <= self.history.half(rung.half).num_prompts
            assert len(set(rung.alphas)) == len(rung.alphas)
            self.evaluate(rung)
        return decide(self.history, settings)

    def evidence(self, decision: Decision) -> list[Measurement]:
        """Measurements of the alpha that the search picked."""
        confirming = decision.look.confidence if decision.look else None
        measured = self.history.measurements(
            [decision.considered], Search().confidence, confirming=confirming
        )
        return list(measured)


def hill(best: float, height: float = 1.0) -> Curve:
    """A parabola in alpha through 0, falling as fast as it rose."""
    return lambda alpha: max(height * (1 - (1 - alpha / best) ** 2), -8)


def flat(alpha: float) -> float:
    return 0.0

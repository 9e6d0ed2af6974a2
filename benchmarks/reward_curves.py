"""Synthetic pairs for `alpha_search.py`: rewards that rise with alpha, peak and collapse, with noisy responses to the same prompts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from benchmarks.held_out_curves import HeldOutPair
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.history import Half, History, Rung
from expo_ray.evaluation.search.response_measures import RESPONSE_MEASURES
from expo_ray.evaluation.search.roles import DEFAULT_ROLES, Criterion, Roles
from expo_ray.evaluation.statistics import Array
from expo_ray.report.results import HalfName

# Standard deviations of the reward: between prompts, the same for every alpha; and of each response.
PROMPT_NOISE, RESIDUAL = 2.0, 1.5
NUM_PROMPTS = 1000  # of each half
_LOWEST = -8.0
# Between the seed of a curve and that of the second reward model's.
_SECOND = 50_000

# As the study of two models was made: both have to see a gain.
BOTH_GAIN = Roles({"second": Criterion("confirm")})
_IDS = tuple(map(str, range(NUM_PROMPTS)))
_ZERO, _ONE = np.zeros(NUM_PROMPTS), np.ones(NUM_PROMPTS)


@dataclass(frozen=True)
class Curve:
    """Mean gain over dpo as a function of alpha.

    Attributes:
        turn: where the rise ends.
        height: of the rise; 0 for a curve that is flat up to its cliff, below 0 for one that falls from the beginning.
        rise: exponent of `1 - |1 - alpha / turn| ** rise`, left of the turn.
        width: right of the turn, the fall is a parabola that reaches 0 at `turn * (1 + width)`.
        cliff: as a multiple of `turn`.
        steepness: of the cliff, on log alpha.
        depth: of the cliff.
    """

    turn: float
    height: float
    rise: float
    width: float
    cliff: float
    steepness: float
    depth: float

    def gain(self, alpha: float) -> float:
        if alpha <= 0:
            return 0.0
        x = alpha / self.turn
        drop = self.depth / (1 + math.exp(min(-math.log(x / self.cliff) / self.steepness, 500)))
        return max(self.height * self._shape(x) - drop, _LOWEST)

    def _shape(self, x: float) -> float:
        if self.height < 0:
            return x
        return 1 - (1 - x) ** self.rise if x < 1 else 1 - ((x - 1) / self.width) ** 2


def draw(seed: int) -> Curve:
    """A curve with a gain: the turn log-uniform in 0.1 to 10, the height log-uniform in 0.3 to 3."""
    generator = np.random.default_rng([seed, 1])
    return Curve(
        turn=float(np.exp(generator.uniform(math.log(0.1), math.log(10)))),
        height=float(np.exp(generator.uniform(math.log(0.3), math.log(3)))),
        rise=generator.uniform(1.5, 2.5),
        width=generator.uniform(0.7, 2),
        cliff=generator.uniform(1.5, 4),
        steepness=generator.uniform(0.05, 0.2),
        depth=generator.uniform(2, 6),
    )


def flat(seed: int) -> Curve:
    """No gain: the reward of dpo up to the cliff."""
    return replace(draw(seed), height=0.0)


def falling(seed: int) -> Curve:
    """No gain: worse from the beginning."""
    curve = draw(seed)
    return replace(curve, height=-curve.height / 2)


def second(seed: int) -> Curve:
    """What another reward model sees of the pair of `draw`: a turn 1 to 8 times as early, log-uniform."""
    turn = draw(seed).turn / float(np.exp(np.random.default_rng([seed, 4]).uniform(0, math.log(8))))
    return replace(draw(seed + _SECOND), turn=turn)


class AnsweredPair(ABC):
    """A pair whose responses are drawn as they are asked for, and what they cost."""

    def __init__(self, roles: Roles = DEFAULT_ROLES) -> None:
        self.history = History(Half(_IDS, {}, roles), Half(_IDS, {}, roles))

    @abstractmethod
    def gain(self, alpha: float) -> float:
        """The true gain of an alpha, as the rewards show it."""

    @abstractmethod
    def worth(self, alpha: float) -> float:
        """The true gain of an alpha, as a user would see it: below 0 it is worse than dpo."""

    @abstractmethod
    def attainable(self) -> float:
        """The largest gain of any alpha."""

    @abstractmethod
    def respond(self, half: HalfName, alpha: float) -> AlphaScores:
        """Draw and score a response to every prompt of a half."""

    def evaluate(self, rung: Rung) -> None:
        """Ask for what a rung lacks."""
        missing = self.history.half(rung.half).missing(rung)
        asked = _IDS[rung.start : rung.stop]
        scores = {alpha: self.respond(rung.half, alpha).on(asked) for alpha in missing}
        self.history = self.history.with_scores(rung.half, scores)

    def mean(self, alpha: float, num_prompts: int = NUM_PROMPTS) -> float:
        """Mean reward on the choosing half, asked for where it is missing."""
        self.evaluate(Rung("choose", (alpha,), 0, num_prompts, ""))
        return float(self.history.choose.scores[alpha].rewards["reward"].mean())


def scored(alpha: float, rewards: Mapping[str, Array], lengths: Array = _ONE) -> AlphaScores:
    """Scores of a response to every prompt of a half, with nothing that a guardrail could object to but their lengths."""
    return AlphaScores(alpha, _IDS, rewards, lengths, dict.fromkeys(RESPONSE_MEASURES, _ZERO))


class SeenCurve(Protocol):
    """What a second reward model sees."""

    def gain(self, alpha: float) -> float: ...


class Pair(AnsweredPair):
    """A pair with a curve of this family.

    Args:
        other: the curve of a second reward model.
        roles: of both.
    """

    def __init__(
        self, curve: Curve, seed: int, other: SeenCurve | None = None, roles: Roles = DEFAULT_ROLES
    ) -> None:
        super().__init__(roles)
        self.curve, self.seed, self.other = curve, seed, other

    def gain(self, alpha: float) -> float:
        """The true gain of an alpha; what is below 0 by either reward model counts as it."""
        gain = self.curve.gain(alpha)
        other = self.other.gain(alpha) if self.other else gain
        return gain if other >= 0 else min(gain, other)

    def worth(self, alpha: float) -> float:
        return self.gain(alpha)

    def attainable(self) -> float:
        return max(0.0, *(self.gain(self.curve.turn * factor) for factor in np.geomspace(0.02, 2, 1000)))

    def respond(self, half: HalfName, alpha: float) -> AlphaScores:
        side = 0 if half == "choose" else 1
        by_prompt = np.random.default_rng([self.seed, 2, side])
        by_response = np.random.default_rng([self.seed, 3, side, round(alpha * 1e6)])
        curves: dict[str, SeenCurve | None] = {"reward": self.curve, "second": self.other}
        rewards = {
            name: by_prompt.normal(0, PROMPT_NOISE, NUM_PROMPTS)
            + curve.gain(alpha)
            + by_response.normal(0, RESIDUAL, NUM_PROMPTS)
            for name, curve in curves.items()
            if curve
        }
        return scored(alpha, rewards)


class HeldOut(AnsweredPair):
    """A pair of the family that nothing is tuned on."""

    def __init__(self, pair: HeldOutPair) -> None:
        super().__init__()
        self.pair = pair

    def gain(self, alpha: float) -> float:
        return self.pair.gain(alpha)

    def worth(self, alpha: float) -> float:
        return self.pair.quality(alpha)

    def attainable(self) -> float:
        return self.pair.attainable()

    def respond(self, half: HalfName, alpha: float) -> AlphaScores:
        side = 0 if half == "choose" else 1
        return scored(alpha, {"reward": self.pair.rewards(side, alpha)}, self.pair.lengths(side, alpha))

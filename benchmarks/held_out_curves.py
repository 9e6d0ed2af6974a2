"""A second family of synthetic pairs, for checking alone: no constant of the search was or is to be tuned on it.

`reward_curves.py` is the family that constants come from. This one has other shapes and other noise: eleven kinds with a gain, and the same
eleven without one. Its file never changes, `tests/evaluation/test_held_out_curves.py` holds its digest; another kind goes into another file.

In all kinds, prompts differ in difficulty and in how strongly they react to alpha, and a response at a small alpha is often dpo's own: on
real pairs, rewards at alpha 0.01, 0.05, 0.1 and 1 correlate with dpo's by about 0.95, 0.7, 0.55 and 0.15.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Shape = Callable[[float], float]

NUM_PROMPTS = 1000  # of each half
# Standard deviations: of the reward between prompts, of each response, and of a prompt's reaction as a share of the mean one.
PROMPT_NOISE, RESIDUAL, REACTION = 2.0, 1.5, 0.3
# Chance that a response is dpo's own: exp(-alpha / this).
SAME_UNTIL = 0.15
# Rare collapses: how often at any alpha above 0, and by how much.
COLLAPSE_RATE, COLLAPSE = 0.015, 20.0
# Reward of a logarithm of length, where gains are bought with it.
LENGTH_SLOPE = 5.0
LARGEST_ALPHA = 51.2
_LOWEST = -8.0
# Nodes of a mean over a normal distribution.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(generator.uniform(math.log(low), math.log(high))))


def _cliff(alpha: float, at: float, depth: float, steepness: float = 0.1) -> float:
    """A fall by `depth` around `at`, on log alpha."""
    return depth / (1 + math.exp(min(-math.log(alpha / at) / steepness, 500)))


def _hill(alpha: float, top: float, height: float) -> float:
    """A parabola in the logarithm of 1 + alpha / top: 0 at dpo, `height` at the top, 0 again at three tops."""
    return height * (1 - (math.log1p(alpha / top) / math.log(2) - 1) ** 2)


def _saturation(generator: np.random.Generator, height: float) -> Shape:
    scale, end = _log_uniform(generator, 0.1, 1.5), generator.uniform(15, 40)
    return lambda alpha: height * (1 - math.exp(-alpha / scale)) - _cliff(alpha, scale * end, 5)


def _plateau(generator: np.random.Generator, height: float) -> Shape:
    begin, length = _log_uniform(generator, 0.1, 2), generator.uniform(4, 10)

    def shape(alpha: float) -> float:
        beyond = max(math.log(alpha / (begin * length)), 0.0)
        return height * min(alpha / begin, 1.0) - 2 * (1 + height) * beyond**2

    return shape


def _two_humps(generator: np.random.Generator, height: float) -> Shape:
    first, apart = _log_uniform(generator, 0.08, 0.5), generator.uniform(6, 14)
    share = generator.uniform(0.3, 0.6)

    def bump(alpha: float, top: float) -> float:
        return math.exp(-0.5 * (math.log(alpha / top) / 0.45) ** 2)

    return lambda alpha: (
        height * (share * bump(alpha, first) + bump(alpha, first * apart))
        - 0.3 * height * bump(alpha, first * math.sqrt(apart))
        - _cliff(alpha, 3 * first * apart, 5)
    )


def _edge(generator: np.random.Generator, height: float) -> Shape:
    top, room = _log_uniform(generator, 0.15, 6), generator.uniform(1.08, 1.3)
    return lambda alpha: height * min(alpha / top, 1.0) ** 0.8 - _cliff(alpha, top * room, 6, 0.02)


def _hill_at(low: float, high: float) -> Callable[[np.random.Generator, float], Shape]:
    def draw(generator: np.random.Generator, height: float) -> Shape:
        top, end = _log_uniform(generator, low, high), generator.uniform(2, 5)
        return lambda alpha: max(_hill(alpha, top, height), -2 * height) - _cliff(alpha, top * end, 4)

    return draw


_SHAPES: Mapping[str, Callable[[np.random.Generator, float], Shape]] = {
    "saturation": _saturation,
    "plateau": _plateau,
    "two humps": _two_humps,
    "cliff after the top": _edge,
    "top near 0.03": _hill_at(0.025, 0.036),
    "top near 25": _hill_at(21, 29),
    "noise of 4": _hill_at(0.15, 6),
    "0/1 rewards": _hill_at(0.15, 6),
    "heavy tails": _hill_at(0.15, 6),
    "rare collapses": _hill_at(0.15, 6),
    "bought with length": _hill_at(0.3, 6),
}
KINDS = tuple(_SHAPES)


@dataclass(frozen=True)
class HeldOutPair:
    """A pair of this family: its true curve, and responses to the same prompts at any alpha.

    Attributes:
        kind: one of `KINDS`.
        seed: of the curve and of all noise.
        null: without a gain at any alpha; the rest of the kind, its noise among it, is the same.
    """

    kind: str
    seed: int
    null: bool = False

    @cached_property
    def _shape(self) -> Shape:
        generator = np.random.default_rng([self.seed, 101, KINDS.index(self.kind)])
        height = _log_uniform(generator, 0.3, 3)
        shape = _SHAPES[self.kind](generator, height)
        return (lambda alpha: min(shape(alpha), 0.0)) if self.null else shape

    def effect(self, alpha: float) -> float:
        """Mean shift that alpha gives the reward, on the scale of the noise; of 0/1 rewards, their logit."""
        return max(self._shape(alpha), _LOWEST) if alpha > 0 else 0.0

    def gain(self, alpha: float) -> float:
        """The true mean reward over dpo's."""
        if self.kind == "0/1 rewards":
            ease = PROMPT_NOISE * _NODES
            difference = _logistic(ease + self.effect(alpha)) - _logistic(ease)
            return float((_WEIGHTS * difference).sum() / _WEIGHTS.sum())
        return self.effect(alpha)

    def quality(self, alpha: float) -> float:
        """The part of the gain that is worth having: where it is bought with length, longer responses are worse."""
        gain = self.gain(alpha)
        return -0.5 * gain if self.kind == "bought with length" and gain > 0 else gain

    def attainable(self) -> float:
        """The largest gain of any alpha."""
        return max(0.0, *(self.gain(float(alpha)) for alpha in np.geomspace(0.004, LARGEST_ALPHA, 2000)))

    def rewards(self, half: int, alpha: float) -> Array:
        """Rewards of a response to each prompt of a half (0 chooses, 1 confirms): (prompts,)."""
        ease, reaction = self._by_prompt(half)
        if self.kind == "0/1 rewards":
            drawn = self._mixed(half, alpha, lambda generator: generator.uniform(size=NUM_PROMPTS))
            return (drawn < _logistic(ease + self.effect(alpha))).astype(np.float64)
        shift = self.effect(alpha) * (1 + REACTION * reaction)
        if self.kind == "bought with length":
            return ease + LENGTH_SLOPE * self._longer(half, alpha) + 0.5 * self._residual(half, alpha)
        return ease + shift + self._residual(half, alpha) + self._collapses(half, alpha)

    def lengths(self, half: int, alpha: float) -> Array:
        """Tokens of the responses: (prompts,). They grow a little with alpha, or as the gain that is bought with them."""
        return np.maximum(1.0, np.round(200 * np.exp(self._longer(half, alpha))))

    def _longer(self, half: int, alpha: float) -> Array:
        """Logarithm of the lengths over 200 tokens."""
        noise = self._mixed(half, alpha, lambda generator: generator.normal(0, 0.3, NUM_PROMPTS), stream=7)
        if self.kind != "bought with length":
            return 0.03 * min(max(alpha, 0.0), 4.0) + noise
        _, reaction = self._by_prompt(half)
        return np.asarray(self.effect(alpha) * (1 + REACTION * reaction) / LENGTH_SLOPE + noise, np.float64)

    def _residual(self, half: int, alpha: float) -> Array:
        return self._mixed(half, alpha, self._residuals)

    def _by_prompt(self, half: int) -> tuple[Array, Array]:
        generator = np.random.default_rng([self.seed, 102, half])
        return generator.normal(0, PROMPT_NOISE, NUM_PROMPTS), generator.standard_normal(NUM_PROMPTS)

    def _residuals(self, generator: np.random.Generator) -> Array:
        if self.kind == "noise of 4":
            return generator.normal(0, 4, NUM_PROMPTS)
        if self.kind == "heavy tails":  # scaled to the same standard deviation
            return RESIDUAL * generator.standard_t(3, NUM_PROMPTS) / math.sqrt(3)
        return generator.normal(0, RESIDUAL, NUM_PROMPTS)

    def _collapses(self, half: int, alpha: float) -> Array:
        """Rare collapses of mean 0: the other responses are better by as much."""
        if self.kind != "rare collapses" or alpha <= 0:
            return np.zeros(NUM_PROMPTS)
        generator = np.random.default_rng([self.seed, 103, half, _micro(alpha)])
        collapsed = generator.uniform(size=NUM_PROMPTS) < COLLAPSE_RATE
        return np.asarray(COLLAPSE * (COLLAPSE_RATE - collapsed), np.float64)

    def _mixed(
        self, half: int, alpha: float, draw: Callable[[np.random.Generator], Array], stream: int = 0
    ) -> Array:
        """Draws of dpo's responses where these are given again, and new ones elsewhere."""
        of_dpo = draw(np.random.default_rng([self.seed, 104 + stream, half, 0]))
        if alpha <= 0:
            return of_dpo
        generator = np.random.default_rng([self.seed, 104 + stream, half, _micro(alpha)])
        fresh = draw(generator)
        return np.where(generator.uniform(size=NUM_PROMPTS) < math.exp(-alpha / SAME_UNTIL), of_dpo, fresh)


def _logistic(values: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-values)), np.float64)


def _micro(alpha: float) -> int:
    """Seed of an alpha."""
    return round(alpha * 1e6)

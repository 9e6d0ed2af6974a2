"""The roles of reward models: by which an alpha has to gain, and by which it must not lose more than a margin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from expo_ray.config import RewardModel, Search
from expo_ray.config.fields import Role
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.statistics import (
    NORMAL,
    Array,
    gain,
    length_controlled_gain,
    student_quantile,
    student_tail,
)
from expo_ray.report.results import HalfName, Interval, RoleTest

# Prompts on whose answers by dpo the rewards of joint models are scaled: those of the first rung, which every search asks.
_SCALED_ON = 64
# Chance that a guard passes what is exactly as good as dpo, for the number of prompts that a message asks for.
_POWER = 0.8


@dataclass(frozen=True)
class Criterion:
    """What a reward model asks of an alpha.

    Attributes:
        margin: loss that `guard` and `joint` let pass, in standard deviations of a paired difference.
    """

    role: Role
    margin: float = 0.1

    @property
    def allows_loss(self) -> bool:
        """True where the gain may be a little below zero."""
        return self.role in ("guard", "joint")

    def limit(self, differences: Array) -> float:
        """The value that the gain's lower bound must exceed, for differences to dpo: (prompts,)."""
        if not self.allows_loss:
            return 0.0
        return -self.margin * float(differences.std(ddof=1)) if len(differences) > 1 else 0.0


@dataclass(frozen=True)
class Roles:
    """The roles of a job's reward models.

    Attributes:
        by_model: criterion by name. The first model of any scores chooses; others that are not listed guard.
        joint: names of the models whose standardised rewards are summed; empty where the first one chooses alone.
        scaled_on: prompts on which they are standardised.
        length_controlled: the gain by what chooses is the one that is left at dpo's length.
    """

    by_model: Mapping[str, Criterion] = field(default_factory=dict)
    joint: tuple[str, ...] = ()
    scaled_on: int = _SCALED_ON
    length_controlled: bool = False

    @classmethod
    def of(cls, models: Sequence[RewardModel], search: Search) -> Roles:
        """The roles that a job file gives."""
        joint = tuple(model.name for model in models if model.role == "joint")
        joint = (models[0].name, *joint) if joint else ()
        criteria = {
            model.name: Criterion("joint" if model.name in joint else model.role or "guard", model.margin)
            for model in models
        }
        return cls(
            criteria, joint, min(_SCALED_ON, search.prompts[0]), search.objective == "length_controlled"
        )

    def criteria(self, models: Iterable[str]) -> Mapping[str, Criterion]:
        """The criterion of each model of some scores, the choosing one first."""
        return {
            model: self.by_model.get(model, Criterion("guard")) if number else Criterion("choose")
            for number, model in enumerate(models)
        }

    def others(self, models: Iterable[str]) -> Sequence[tuple[str, Criterion]]:
        """The models of some scores that do not choose, each with its criterion."""
        return list(self.criteria(models).items())[1:]

    def scales(self, dpo: AlphaScores, prompt_ids: Sequence[str]) -> Mapping[str, float]:
        """Standard deviations of dpo's rewards by the joint models, on the first prompts of a half."""
        first = [prompt_id for prompt_id in prompt_ids[: self.scaled_on] if prompt_id in dpo.row_of]
        rows = [dpo.row_of[prompt_id] for prompt_id in first]
        return {model: float(np.std(dpo.rewards[model][rows])) or 1.0 for model in self.joint}

    def with_objective(self, scores: AlphaScores, scales: Mapping[str, float]) -> AlphaScores:
        """The scores with what alpha is chosen by in front: for joint models, the sum of their rewards in standard deviations."""
        if not self.joint:
            return scores
        together = np.sum([scores.rewards[model] / scales[model] for model in self.joint], axis=0)
        return replace(scores, rewards={" + ".join(self.joint): together, **scores.rewards})


# The first model chooses, all others guard.
DEFAULT_ROLES = Roles()


def role_tests(
    half: HalfName, scores: AlphaScores, dpo: AlphaScores, roles: Roles, confidence: float
) -> tuple[RoleTest, ...]:
    """Test an alpha by every reward model, each in its role; it may be chosen only if all pass."""
    tests = []
    for model, criterion in roles.criteria(scores.rewards).items():
        rewards, of_dpo = scores.rewards[model], dpo.rewards[model]
        if criterion.role == "choose" and roles.length_controlled:
            lengths = scores.lengths, dpo.lengths
            bound = length_controlled_gain(rewards, of_dpo, *lengths, confidence, clusters=dpo.clusters)
        else:
            bound = gain(rewards, of_dpo, confidence, clusters=dpo.clusters)
        limit = criterion.limit(rewards - of_dpo)
        margin = criterion.margin if criterion.allows_loss else None
        passed = bound.low > limit
        p_value = _p_value(
            bound, limit, confidence, len(rewards) if dpo.clusters is None else len(np.unique(dpo.clusters))
        )
        tests.append(
            RoleTest(model, criterion.role, half, len(rewards), bound, limit, margin, passed, p_value)
        )
    return tuple(tests)


def _p_value(bound: Interval, limit: float, confidence: float, units: int) -> float:
    """One-sided p value of a gain at the limit, by the t distribution that has this interval's lower end: below its level where that passes."""
    error = (bound.mean - bound.low) / student_quantile(0.5 + confidence / 2, units - 1)
    return student_tail((bound.mean - limit) / error, units - 1) if error > 0 else float(bound.mean <= limit)


def prompts_needed(margin: float, confidence: float) -> int:
    """Number of prompts on which a guard passes four of five alphas that are exactly as good as dpo."""
    z = NORMAL.inv_cdf(0.5 + confidence / 2) + NORMAL.inv_cdf(_POWER)
    return math.ceil((z / margin) ** 2)

"""What a search has seen so far, and what it asks for next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from expo_ray.config import format_alpha
from expo_ray.evaluation.search.alpha_scores import AlphaScores, EvaluationError
from expo_ray.evaluation.statistics import Array

HalfName = Literal["choose", "confirm"]


@dataclass(frozen=True)
class Rung:
    """One round of a search: alphas to evaluate, each independent of the others.

    Attributes:
        half: of the prompt set.
        alphas: to have evaluated after this round; some may be already.
        num_prompts: on the first so many prompts of the half.
        why: for a progress line.
    """

    half: HalfName
    alphas: tuple[float, ...]
    num_prompts: int
    why: str


@dataclass(frozen=True)
class Half:
    """One half of a prompt set, and what is known on it.

    Attributes:
        num_prompts: of the half; 0 if there is none.
        scores: by alpha, each on the first prompts of the half, as many as were asked.
    """

    num_prompts: int
    scores: Mapping[float, AlphaScores]

    def has(self, rung: Rung) -> bool:
        """True if the half knows all that `rung` asks for."""
        return all(
            alpha in self.scores and len(self.scores[alpha].prompt_ids) >= rung.num_prompts
            for alpha in rung.alphas
        )

    def at(self, alpha: float, num_prompts: int) -> AlphaScores:
        """One alpha on the first `num_prompts` prompts.

        Raises:
            EvaluationError: if its prompts are not those of dpo; a paired difference would then mean nothing.
        """
        found, dpo = self.scores[alpha].first(num_prompts), self.scores[0.0].first(num_prompts)
        if found.prompt_ids != dpo.prompt_ids or list(found.rewards) != list(dpo.rewards):
            raise EvaluationError(
                f"alpha {format_alpha(alpha)} was evaluated on other prompts or reward models than dpo; evaluate both on the "
                "same prompt set, in its order, and by the same reward models"
            )
        return found

    def rewards(self, alphas: tuple[float, ...], num_prompts: int) -> Array:
        """What the choosing reward model gave: (prompts, alphas)."""
        found = [self.at(alpha, num_prompts) for alpha in alphas]
        return np.stack([next(iter(one.rewards.values())) for one in found], axis=1)


@dataclass(frozen=True)
class History:
    """All results of one pair: alpha is chosen on one half of the prompts, and confirmed on the other."""

    choose: Half
    confirm: Half = Half(0, {})

    def half(self, name: HalfName) -> Half:
        """The half of that name."""
        return self.choose if name == "choose" else self.confirm

    @property
    def generations(self) -> int:
        """Responses that were generated."""
        return sum(
            len(one.prompt_ids) * one.samples
            for half in (self.choose, self.confirm)
            for one in half.scores.values()
        )

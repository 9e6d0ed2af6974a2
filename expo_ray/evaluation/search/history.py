"""State of a search: the scores it has, the rung it asks for next, and the alpha that it picks in the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from expo_ray.config import format_alpha
from expo_ray.evaluation.search.alpha_scores import AlphaScores, EvaluationError, measurements
from expo_ray.evaluation.statistics import Array
from expo_ray.report.results import HalfName, Measurement

HALF_NAMES: tuple[HalfName, HalfName] = ("choose", "confirm")


@dataclass(frozen=True)
class Rung:
    """A round of a search: alphas to evaluate, each independent of the others.

    Attributes:
        half: of the prompt set.
        alphas: to have evaluated after this round; some may be already.
        num_prompts: to evaluate them on: the first ones of the half.
        stage: of the search, for a progress line.
    """

    half: HalfName
    alphas: tuple[float, ...]
    num_prompts: int
    stage: str


@dataclass(frozen=True)
class Half:
    """A half of the prompt set, and the scores on it.

    Attributes:
        num_prompts: of the half; 0 if there is none.
        scores: by alpha, each on the first prompts of the half, as many as were asked.
    """

    num_prompts: int
    scores: Mapping[float, AlphaScores]

    def missing(self, rung: Rung) -> list[float]:
        """The alphas of `rung` that lack scores on some of its prompts."""
        return [
            alpha
            for alpha in rung.alphas
            if alpha not in self.scores or len(self.scores[alpha].prompt_ids) < rung.num_prompts
        ]

    def at(self, alpha: float, num_prompts: int) -> AlphaScores:
        """Scores of an alpha on the first `num_prompts` prompts.

        Raises:
            EvaluationError: if its prompts are not those of dpo; a paired difference would then mean nothing.
        """
        scores, dpo = self.scores[alpha].first(num_prompts), self.scores[0.0].first(num_prompts)
        if scores.prompt_ids != dpo.prompt_ids or list(scores.rewards) != list(dpo.rewards):
            raise EvaluationError(
                f"alpha {format_alpha(alpha)} was evaluated on other prompts or reward models than dpo; evaluate both on the "
                "same prompt set, in its order, and by the same reward models"
            )
        return scores

    def beside_dpo(self, alpha: float) -> tuple[AlphaScores, AlphaScores]:
        """Scores of an alpha and of dpo, on all prompts that both were evaluated on."""
        common = min(len(self.scores[each].prompt_ids) for each in (0.0, alpha))
        return self.at(alpha, common), self.at(0.0, common)

    def rewards(self, alphas: tuple[float, ...], num_prompts: int) -> Array:
        """Rewards by the choosing model: (prompts, alphas)."""
        by_alpha = [self.at(alpha, num_prompts) for alpha in alphas]
        return np.stack([scores.rewards[scores.chooser] for scores in by_alpha], axis=1)


@dataclass(frozen=True)
class History:
    """All scores of one pair: alpha is chosen on one half of the prompts, and confirmed on the other."""

    choose: Half
    confirm: Half = Half(0, {})

    def half(self, name: HalfName) -> Half:
        """The half of that name."""
        return self.choose if name == "choose" else self.confirm

    def with_scores(self, half: HalfName, scores: Mapping[float, AlphaScores]) -> History:
        """The history with more scores on a half."""
        known = self.half(half)
        return replace(self, **{half: replace(known, scores={**known.scores, **scores})})

    def measurements(self, alphas: Iterable[float], confidence: float) -> Iterator[Measurement]:
        """Compare alphas with dpo on each half that has their scores."""
        for name in HALF_NAMES:
            half = self.half(name)
            for alpha in sorted(set(alphas) & half.scores.keys()):
                yield from measurements(name, *half.beside_dpo(alpha), confidence)

    @property
    def generations(self) -> int:
        """Responses that were generated."""
        return sum(
            len(scores.prompt_ids) * scores.samples
            for half in (self.choose, self.confirm)
            for scores in half.scores.values()
        )


@dataclass(frozen=True)
class Rejected:
    """An alpha that was tried and not chosen.

    Attributes:
        alpha: as served.
        stage: of the search, such as `ladder`, `race at 256 prompts` or `confirmation`.
        reason: with the values that decided.
    """

    alpha: float
    stage: str
    reason: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


@dataclass(frozen=True)
class Picked:
    """The alpha that a method picks on the choosing half; its gain over dpo is not tested yet.

    Attributes:
        alpha: 0 where no other alpha was left.
        num_prompts: on which it was compared with the last others.
        rejected: all others.
        warnings: on the way, such as a climb that ended before the reward fell.
        fault: reason for alpha 0; empty if it is not 0.
    """

    alpha: float
    num_prompts: int
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...] = ()
    fault: str = ""

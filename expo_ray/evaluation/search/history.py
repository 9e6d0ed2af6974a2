"""State of a search: the scores it has, the rung it asks for next, and the alpha that it picks in the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from expo_ray.config import format_alpha
from expo_ray.evaluation.search.alpha_scores import AlphaScores, EvaluationError, measurements
from expo_ray.evaluation.search.roles import DEFAULT_ROLES, Criterion, Roles
from expo_ray.evaluation.statistics import Array, at_equal_length
from expo_ray.report.results import FittedGain, HalfName, Measurement
from expo_ray.text import first_few

HALF_NAMES: tuple[HalfName, HalfName] = ("choose", "confirm")


@dataclass(frozen=True)
class Rung:
    """A round of a search: alphas to evaluate, each independent of the others, on a slice of the prompts.

    Attributes:
        half: of the prompt set.
        alphas: to have evaluated after this round; some may be already.
        start, stop: the slice, counted from the first prompt of the half.
        stage: of the search, for a progress line.
    """

    half: HalfName
    alphas: tuple[float, ...]
    start: int
    stop: int
    stage: str

    @property
    def num_prompts(self) -> int:
        """Prompts of the slice."""
        return self.stop - self.start


@dataclass(frozen=True)
class Half:
    """A half of the prompt set, and the scores on it: any alpha on any of its prompts.

    Attributes:
        prompt_ids: in the order in which prompts are asked; none if there is no such half.
        scores: by alpha, each on the prompts that were asked, in the order in which they were.
        roles: of the reward models.
        clusters: of its prompts, by id; prompts that are not there stand alone.
    """

    prompt_ids: tuple[str, ...]
    scores: Mapping[float, AlphaScores]
    roles: Roles = DEFAULT_ROLES
    clusters: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_prompts(self) -> int:
        """Prompts of the half, asked or not."""
        return len(self.prompt_ids)

    def missing(self, rung: Rung) -> list[float]:
        """The alphas of `rung` that lack scores on some of its prompts."""
        wanted = self.prompt_ids[rung.start : rung.stop]
        return [
            alpha
            for alpha in rung.alphas
            if alpha not in self.scores or not self.scores[alpha].row_of.keys() >= set(wanted)
        ]

    def beside_dpo(self, alpha: float, stop: int | None = None) -> tuple[AlphaScores, AlphaScores]:
        """Scores of an alpha and of dpo, on the prompts before `stop` that both were evaluated on.

        Raises:
            EvaluationError: if there is no such prompt, or their reward models differ; a paired difference would then mean nothing.
        """
        scores, dpo = self.scores[alpha], self.scores[0.0]
        common = self._common((0.0, alpha), 0, stop)
        if not common or list(scores.rewards) != list(dpo.rewards):
            raise EvaluationError(
                f"alpha {format_alpha(alpha)} was evaluated on other prompts or reward models than dpo; evaluate both on the "
                "same prompt set, and by the same reward models"
            )
        return self.scored(alpha, common), self.scored(0.0, common)

    def scored(self, alpha: float, prompt_ids: Sequence[str] | None = None) -> AlphaScores:
        """Scores of an alpha on some prompts, by default all that it was asked; what alpha is chosen by comes first."""
        scores = self.scores[alpha] if prompt_ids is None else self.scores[alpha].on(prompt_ids)
        scores = self.roles.with_objective(scores, self._scales) if self.roles.joint else scores
        return scores.clustered(self.clusters) if self.clusters else scores

    def others(self) -> Sequence[tuple[str, Criterion]]:
        """The reward models that do not choose, each with what it asks for."""
        return self.roles.others(self.scored(0.0).rewards)

    @property
    def guarded(self) -> bool:
        """True where some reward model asks that alpha loses no more than a margin."""
        return any(criterion.allows_loss for _, criterion in self.others())

    @cached_property
    def _scales(self) -> Mapping[str, float]:
        return self.roles.scales(self.scores[0.0], self.prompt_ids)

    def rewards(
        self, alphas: Sequence[float], stop: int | None = None, start: int = 0, *, model: str = ""
    ) -> Array:
        """Rewards by a model, by default the choosing one, on the prompts of a slice that all `alphas` were evaluated on: (prompts, alphas)."""
        common = self._common(alphas, start, stop)
        seen = [self.scored(alpha) for alpha in alphas]
        rows = [[scores.row_of[prompt_id] for prompt_id in common] for scores in seen]
        pairs = list(zip(seen, rows, strict=True))
        rewards = np.stack([scores.rewards[model or scores.chooser][at] for scores, at in pairs], axis=1)
        if model or not self.roles.length_controlled:
            return rewards
        return at_equal_length(rewards, np.stack([scores.lengths[at] for scores, at in pairs], axis=1))

    def _common(self, alphas: Sequence[float], start: int, stop: int | None) -> list[str]:
        """The prompts of a slice that all `alphas` were evaluated on, in the order of the half."""
        wanted = self.prompt_ids[start:stop]
        common = set(wanted).intersection(*(self.scores[alpha].row_of for alpha in alphas))
        return [prompt_id for prompt_id in wanted if prompt_id in common]


@dataclass(frozen=True)
class History:
    """All scores of one pair: alpha is chosen on one half of the prompts, and confirmed on the other.

    Attributes:
        asked: the rungs that an earlier run of this search asked for, in order. Their alphas are taken where this machine would compute
            others, in the last bits of a float.
    """

    choose: Half
    confirm: Half = Half((), {})
    asked: tuple[Rung, ...] = ()

    def half(self, name: HalfName) -> Half:
        """The half of that name."""
        return self.choose if name == "choose" else self.confirm

    def with_scores(self, half: HalfName, scores: Mapping[float, AlphaScores]) -> History:
        """The history with more scores on a half.

        Raises:
            EvaluationError: if they are on prompts that the half does not have.
        """
        known = self.half(half)
        merged = dict(known.scores)
        for alpha, new in scores.items():
            if foreign := new.row_of.keys() - known.prompt_ids:
                raise EvaluationError(
                    f"alpha {format_alpha(alpha)} was evaluated on {len(foreign)} prompt(s) that are not of this half "
                    f"({first_few(sorted(foreign))}); evaluate it on the same prompt set as dpo"
                )
            merged[alpha] = merged[alpha].joined(new) if alpha in merged else new
        half_now = replace(known, scores=merged)
        return replace(self, choose=half_now) if half == "choose" else replace(self, confirm=half_now)

    def measurements(
        self, alphas: Iterable[float], confidence: float, *, confirming: float | None = None
    ) -> Iterator[Measurement]:
        """Compare alphas with dpo on each half that has their scores.

        Args:
            alphas: those that were not evaluated on a half are left out there.
            confidence: of the intervals.
            confirming: of the intervals on the confirming half, where it is another.
        """
        for name in HALF_NAMES:
            half = self.half(name)
            level = confirming if confirming and name == "confirm" else confidence
            for alpha in sorted(set(alphas) & half.scores.keys()):
                yield from measurements(name, *half.beside_dpo(alpha), level)

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
        num_prompts: the first ones of the half, on which it was compared with the last others.
        rejected: all others.
        warnings: on the way, such as a climb that ended before the reward fell.
        fault: reason for alpha 0; empty if it is not 0.
        fitted: the curve of the gain that it was picked by, of the methods that fit it.
    """

    alpha: float
    num_prompts: int
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...] = ()
    fault: str = ""
    fitted: tuple[FittedGain, ...] = ()

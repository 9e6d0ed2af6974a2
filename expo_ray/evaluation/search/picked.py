"""What a method of search hands over: an alpha, before anything is asked of the gain over dpo."""

from __future__ import annotations

from dataclasses import dataclass

from expo_ray.config import Search
from expo_ray.evaluation.search.guardrails import checks, rejection
from expo_ray.evaluation.search.history import Half
from expo_ray.evaluation.statistics import standard_error


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


@dataclass(frozen=True)
class Picked:
    """The outcome of a method of search on the choosing half.

    Attributes:
        alpha: 0 where no other alpha was left.
        num_prompts: on which it was compared with the last others.
        rejected: all others.
        warnings: on the way, such as a climb that ended before the reward fell.
        fault: why alpha is 0; empty if it is not.
    """

    alpha: float
    num_prompts: int
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...] = ()
    fault: str = ""


def sizes_of(half: Half, settings: Search) -> tuple[int, ...]:
    """Prompts of each round; never more than the half has."""
    return tuple(sorted({min(size, half.num_prompts) for size in settings.prompts}))


def veto(half: Half, settings: Search, alpha: float, num_prompts: int, confidence: float) -> str:
    """Why the guardrails reject an alpha; empty if they do not."""
    one, dpo = half.at(alpha, num_prompts), half.at(0.0, num_prompts)
    return rejection(checks(one, dpo, settings.guardrails, confidence))


def objection(half: Half, alpha: float, num_prompts: int) -> str:
    """Why another reward model can hardly confirm an alpha: it finds dpo better, by more than one standard error; empty if none does.

    For the last look before the confirmation, where each reward model has to see a gain; earlier ones take significance (`veto`).
    """
    one, dpo = half.at(alpha, num_prompts), half.at(0.0, num_prompts)
    for name in list(one.rewards)[1:]:
        loss = float((dpo.rewards[name] - one.rewards[name]).mean())
        error = standard_error(one.rewards[name], dpo.rewards[name])
        if loss > error:
            return (
                f"{name} has to confirm it, and gives it {loss:.3f} less than dpo on {num_prompts} prompts, where the standard "
                f"error is {error:.3f}"
            )
    return ""


def smallest_within_one_error(half: Half, alphas: tuple[float, ...], num_prompts: int) -> tuple[float, float]:
    """The best of `alphas`, and the smallest one that is at most one standard error of their difference below it."""
    rewards = half.rewards(alphas, num_prompts)
    means = rewards.mean(axis=0)
    best = int(means.argmax())
    within = [
        alpha
        for at, alpha in enumerate(alphas)
        if means[best] - means[at] <= standard_error(rewards[:, best], rewards[:, at])
    ]
    return alphas[best], min(within)

"""The decision: which alpha, or dpo as it is, and on what evidence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from expo_ray.config import Search, format_alpha
from expo_ray.evaluation.search.guardrails import Check, checks, rejection
from expo_ray.evaluation.search.history import HalfName, History
from expo_ray.evaluation.search.methods import looks_better, picked_alpha
from expo_ray.evaluation.search.picked import Picked, Rejected
from expo_ray.evaluation.statistics import gain, length_controlled_gain, win_rate
from expo_ray.report.results import Interval


@dataclass(frozen=True)
class Evidence:
    """One reward model's view of an alpha, against dpo on the same prompts.

    Attributes:
        half: `choose`, where the search picked the alpha (its gain is flattered by that), or `confirm`, untouched before.
        reward: name of the reward model.
        num_prompts: compared.
        gain: mean difference of rewards.
        length_controlled: the gain that is left at dpo's length.
        win_rate: share of prompts with a higher reward; ties count half.
    """

    half: HalfName
    reward: str
    num_prompts: int
    gain: Interval
    length_controlled: Interval
    win_rate: Interval


@dataclass(frozen=True)
class Decision:
    """What the search came to.

    Attributes:
        alpha: the chosen one; 0 means that dpo stays as it is.
        reason: in a sentence, with the values that decided.
        considered: the alpha that the search picked and the evidence is about; 0 where none was left.
        evidence: of `considered`, for each half and reward model.
        guardrails: of `considered`, on the last half that saw it.
        rejected: every other alpha that was tried, and `considered` too if it fell at the end.
        warnings: what a reader should know besides.
        generations: responses spent on the search, those of dpo included.
        confidence: of the intervals.
    """

    alpha: float
    reason: str
    considered: float
    evidence: tuple[Evidence, ...]
    guardrails: tuple[Check, ...]
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...]
    generations: int
    confidence: float


def decide(history: History, settings: Search) -> Decision:
    """The decision of a finished search; a function of its results alone.

    Alpha is above 0 only if the lower bound of its paired gain over dpo is: on the choosing half, and on the untouched one by
    every reward model. Where no half was left untouched, the bound on the choosing half is corrected for the number of alphas tried.

    Raises:
        SearchError: if `next_rung` still asks for something.
    """
    picked = picked_alpha(history, settings)
    evidence = tuple(_evidence(history, settings, picked)) if picked.alpha else ()
    found = _guardrails(history, settings, picked)
    fault = _fault(history, settings, picked, evidence, found)
    rejected = list(picked.rejected)
    if fault and picked.alpha:
        stage = "confirmation" if any(one.half == "confirm" for one in evidence) else "gain over dpo"
        rejected.append(Rejected(picked.alpha, stage, fault))
    alpha = 0.0 if fault else picked.alpha
    return Decision(
        alpha=alpha,
        reason=f"keep dpo (alpha 0): {fault}" if fault else _praise(alpha, evidence),
        considered=picked.alpha,
        evidence=evidence,
        guardrails=found,
        rejected=tuple(sorted(rejected, key=lambda one: one.alpha)),
        warnings=picked.warnings + tuple(check.text for check in found if check.verdict == "warn"),
        generations=history.generations,
        confidence=settings.confidence,
    )


def _evidence(history: History, settings: Search, picked: Picked) -> Iterator[Evidence]:
    names: tuple[HalfName, ...] = ("choose", "confirm")
    for name in names:
        half = history.half(name)
        if picked.alpha not in half.scores or 0.0 not in half.scores:
            continue
        size = min(len(half.scores[alpha].prompt_ids) for alpha in (0.0, picked.alpha))
        one, dpo = half.at(picked.alpha, size), half.at(0.0, size)
        for reward, values in one.rewards.items():
            before = dpo.rewards[reward]
            yield Evidence(
                name,
                reward,
                size,
                gain(values, before, settings.confidence),
                length_controlled_gain(values, before, one.lengths, dpo.lengths, settings.confidence),
                win_rate(values, before, settings.confidence),
            )


def _guardrails(history: History, settings: Search, picked: Picked) -> tuple[Check, ...]:
    if not picked.alpha:
        return ()
    half = history.confirm if picked.alpha in history.confirm.scores else history.choose
    size = min(len(half.scores[alpha].prompt_ids) for alpha in (0.0, picked.alpha))
    return checks(half.at(picked.alpha, size), half.at(0.0, size), settings.guardrails, settings.confidence)


def _fault(
    history: History,
    settings: Search,
    picked: Picked,
    evidence: tuple[Evidence, ...],
    found: tuple[Check, ...],
) -> str:
    """Why alpha is 0; empty if it is not."""
    if not picked.alpha:
        return picked.fault
    confirmed = [one for one in evidence if one.half == "confirm"]
    if not confirmed and looks_better(history, picked, settings.confidence):
        return _corrected_fault(history, settings, picked) or rejection(found)
    failed = [one for one in confirmed or evidence[:1] if one.gain.low <= 0]
    return "; ".join(_shortfall(picked.alpha, one, one.gain) for one in failed) or rejection(found)


def _corrected_fault(history: History, settings: Search, picked: Picked) -> str:
    """The test on the choosing half alone: the alpha was picked on it, from among many (Bonferroni)."""
    tried = sum(alpha > 0 for alpha in history.choose.scores)
    confidence = 1 - (1 - settings.confidence) / tried
    rewards = history.choose.rewards((picked.alpha, 0.0), picked.num_prompts)
    bound = gain(rewards[:, 0], rewards[:, 1], confidence)
    if bound.low > 0:
        return ""
    return (
        f"the gain of alpha {format_alpha(picked.alpha)} over dpo is {bound}, corrected for the {tried} alphas tried, and no prompts "
        "were left to confirm it on; with more prompts it might show"
    )


def _shortfall(alpha: float, one: Evidence, bound: Interval) -> str:
    where = "untouched prompts" if one.half == "confirm" else "the prompts that alpha was chosen on"
    return (
        f"on {one.num_prompts} {where}, the gain of alpha {format_alpha(alpha)} over dpo by {one.reward} is {bound}, and its lower "
        "bound is not above zero"
    )


def _praise(alpha: float, evidence: tuple[Evidence, ...]) -> str:
    last = evidence[-1].half
    bounds = " and ".join(f"{one.gain} by {one.reward}" for one in evidence if one.half == last)
    where = "untouched prompts" if last == "confirm" else "the prompts it was chosen on"
    return f"alpha {format_alpha(alpha)}: its gain over dpo on {evidence[-1].num_prompts} {where} is {bounds}"

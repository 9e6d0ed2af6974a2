"""The decision of a finished search: an alpha, or dpo as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expo_ray.config import Search, format_alpha
from expo_ray.evaluation.search.confirmation import Look
from expo_ray.evaluation.search.guardrails import checks, rejection
from expo_ray.evaluation.search.history import History, Picked, Rejected
from expo_ray.evaluation.search.methods import looks_better, outcome_of
from expo_ray.evaluation.statistics import gain
from expo_ray.report.results import GuardrailCheck, Measurement


@dataclass(frozen=True)
class Decision:
    """An alpha with its reasons.

    Attributes:
        alpha: the chosen one; 0 means that dpo stays as it is.
        reason: in a sentence, with the values that decided.
        considered: the alpha that the search picked; 0 where none was left.
        rejected: every other alpha that was tried, and `considered` too if it fell at the end.
        warnings: what a reader should know besides.
        look: at the confirming half, that decided; None where there was none.
    """

    alpha: float
    reason: str
    considered: float
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...]
    look: Look | None = None


def decide(history: History, settings: Search) -> Decision:
    """Decide a finished search, as a function of its results alone.

    Alpha is above 0 only if the lower bound of its paired gain over dpo is: on the choosing half, and on the untouched one by
    every reward model. Where no half was left untouched, the bound on the choosing half is corrected for the number of alphas tried.

    Raises:
        SearchError: if `next_rung` still asks for something.
    """
    outcome = outcome_of(history, settings)
    picked, look = outcome.picked, outcome.look
    rejected = list(picked.rejected)
    if not picked.alpha:
        return Decision(0.0, f"keep dpo (alpha 0): {picked.fault}", 0.0, _sorted(rejected), picked.warnings)
    confirming = look.confidence if look else settings.confidence
    evidence = tuple(history.measurements([picked.alpha], settings.confidence, confirming=confirming))
    checked = _last_checks(history, settings, picked.alpha)
    fault = _fault(history, settings, picked, evidence, checked)
    if fault:
        stage = "confirmation" if evidence[-1].half == "confirm" else "gain over dpo"
        rejected.append(Rejected(picked.alpha, stage, fault))
    return Decision(
        alpha=0.0 if fault else picked.alpha,
        reason=f"keep dpo (alpha 0): {fault}" if fault else _praise(picked.alpha, evidence),
        considered=picked.alpha,
        rejected=_sorted(rejected),
        warnings=picked.warnings + tuple(check.text for check in checked if check.verdict == "warn"),
        look=look,
    )


def _sorted(rejected: Sequence[Rejected]) -> tuple[Rejected, ...]:
    return tuple(sorted(rejected, key=lambda each: each.alpha))


def _last_checks(history: History, settings: Search, alpha: float) -> tuple[GuardrailCheck, ...]:
    """The guardrails on the last half that saw the alpha."""
    half = history.confirm if alpha in history.confirm.scores else history.choose
    return checks(*half.beside_dpo(alpha), settings.guardrails, settings.confidence)


def _fault(
    history: History,
    settings: Search,
    picked: Picked,
    evidence: Sequence[Measurement],
    checked: Sequence[GuardrailCheck],
) -> str:
    """The reason to keep dpo; empty if there is none."""
    confirmed = [measured for measured in evidence if measured.half == "confirm"]
    if not confirmed and looks_better(history, picked, settings):
        return _corrected_fault(history, settings, picked) or rejection(checked)
    # Unconfirmed: the choosing model's gain on the choosing half, which did not look better than dpo.
    failed = [measured for measured in confirmed or evidence[:1] if measured.gain.low <= 0]
    return "; ".join(map(_shortfall, failed)) or rejection(checked)


def _corrected_fault(history: History, settings: Search, picked: Picked) -> str:
    """Test the gain on the choosing half alone: the alpha was picked on it, from among many (Bonferroni)."""
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


def _shortfall(measured: Measurement) -> str:
    return (
        f"on {_where(measured)}, the gain of alpha {format_alpha(measured.alpha)} over dpo by {measured.reward_model} is "
        f"{measured.gain}, and its lower bound is not above zero"
    )


def _praise(alpha: float, evidence: Sequence[Measurement]) -> str:
    last = evidence[-1]
    bounds = " and ".join(
        f"{measured.gain} by {measured.reward_model}" for measured in evidence if measured.half == last.half
    )
    return f"alpha {format_alpha(alpha)}: its gain over dpo on {_where(last)} is {bounds}"


def _where(measured: Measurement) -> str:
    if measured.half == "confirm":
        return f"{measured.prompts} untouched prompts"
    return f"the {measured.prompts} prompts it was chosen on"

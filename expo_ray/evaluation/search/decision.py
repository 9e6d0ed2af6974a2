"""The decision of a finished search: an alpha, or dpo as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expo_ray.config import Search, format_alpha
from expo_ray.evaluation.search.confirmation import Look, tests_at
from expo_ray.evaluation.search.guardrails import checks, rejection
from expo_ray.evaluation.search.history import History, Picked, Rejected
from expo_ray.evaluation.search.methods import looks_better, outcome_of
from expo_ray.evaluation.search.roles import prompts_needed, role_tests
from expo_ray.report.results import GuardrailCheck, RoleTest


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
        tests: of `considered`, by each reward model in its role.
    """

    alpha: float
    reason: str
    considered: float
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...]
    look: Look | None = None
    tests: tuple[RoleTest, ...] = ()


def decide(history: History, settings: Search) -> Decision:
    """Decide a finished search, as a function of its results alone.

    Alpha is above 0 only if every reward model lets it pass in its role (`roles`), on the untouched half: the lower bound of its paired gain
    over dpo is above zero, or above the loss that the model allows. Where no half was left untouched, the bounds on the choosing half are
    corrected for the number of alphas tried.

    Raises:
        SearchError: if `next_rung` still asks for something.
    """
    outcome = outcome_of(history, settings)
    picked, look = outcome.picked, outcome.look
    rejected = list(picked.rejected)
    if not picked.alpha:
        return Decision(0.0, f"keep dpo (alpha 0): {picked.fault}", 0.0, _sorted(rejected), picked.warnings)
    # Without an untouched half, the alpha is tested on the very prompts that it was picked on, from among many (Bonferroni).
    corrected_for = _tried(history) if not look and looks_better(history, picked, settings) else 0
    tests = _tests(history, settings, picked, look, corrected_for)
    checked = _last_checks(history, settings, picked.alpha)
    fault = _fault(picked.alpha, tests, settings, corrected_for=corrected_for) or rejection(checked)
    if fault:
        stage = "confirmation" if look else "gain over dpo"
        rejected.append(Rejected(picked.alpha, stage, fault))
    return Decision(
        alpha=0.0 if fault else picked.alpha,
        reason=f"keep dpo (alpha 0): {fault}" if fault else _praise(picked.alpha, tests),
        considered=picked.alpha,
        rejected=_sorted(rejected),
        warnings=picked.warnings + tuple(check.text for check in checked if check.verdict == "warn"),
        look=look,
        tests=tests,
    )


def _sorted(rejected: Sequence[Rejected]) -> tuple[Rejected, ...]:
    return tuple(sorted(rejected, key=lambda each: each.alpha))


def _tried(history: History) -> int:
    """Alphas above 0 that the choosing half has seen."""
    return sum(alpha > 0 for alpha in history.choose.scores)


def _tests(
    history: History, settings: Search, picked: Picked, look: Look | None, corrected_for: int
) -> tuple[RoleTest, ...]:
    """The tests that decide: on the untouched half; else on the choosing half, by the choosing model alone where that sees no gain."""
    if look:
        return tests_at(history.confirm, picked.alpha, look)
    scores, dpo = history.choose.beside_dpo(picked.alpha, picked.num_prompts)
    confidence = 1 - (1 - settings.confidence) / max(corrected_for, 1)
    tests = role_tests("choose", scores, dpo, history.choose.roles, confidence)
    return tests if corrected_for else tests[:1]


def _last_checks(history: History, settings: Search, alpha: float) -> tuple[GuardrailCheck, ...]:
    """The guardrails on the last half that saw the alpha."""
    half = history.confirm if alpha in history.confirm.scores else history.choose
    return checks(*half.beside_dpo(alpha), settings.guardrails, settings.confidence, half.roles)


def _fault(alpha: float, tests: Sequence[RoleTest], settings: Search, *, corrected_for: int) -> str:
    """The reason to keep dpo; empty if every test has passed."""
    texts = [_shortfall(alpha, test, settings) for test in tests if not test.passed]
    if texts and corrected_for:
        texts.append(
            f"the bounds are corrected for the {corrected_for} alphas tried, and no prompts were left to confirm on; with more prompts it might show"
        )
    return "; ".join(texts)


def _shortfall(alpha: float, test: RoleTest, settings: Search) -> str:
    found = f"on {_where(test)}, the gain of alpha {format_alpha(alpha)} over dpo by {test.reward_model} is {test.gain}"
    if test.margin is None:
        return f"{found}, and its lower bound is not above zero"
    needed = prompts_needed(test.margin, settings.confidence)
    short = f"; {needed:,} prompts show it in four of five cases" if test.prompts < needed else ""
    return f"{found}, which does not exclude a loss of {_margin_text(test)}{short}"


def _praise(alpha: float, tests: Sequence[RoleTest]) -> str:
    bounds = " and ".join(
        f"{test.gain} by {test.reward_model}"
        + (f", not worse by more than {_margin_text(test)}" if test.margin is not None else "")
        for test in tests
    )
    return f"alpha {format_alpha(alpha)}: its gain over dpo on {_where(tests[0])} is {bounds}"


def _margin_text(test: RoleTest) -> str:
    return f"{-test.limit:.3f} ({test.margin:g} standard deviations)"


def _where(test: RoleTest) -> str:
    if test.half == "confirm":
        return f"{test.prompts} untouched prompts"
    return f"the {test.prompts} prompts it was chosen on"

"""The decision of a finished search: an alpha, or dpo as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expo_ray.config import Search, format_alpha
from expo_ray.evaluation.search.confirmation import Look, looks_of
from expo_ray.evaluation.search.guardrails import rejection
from expo_ray.evaluation.search.history import History, Rejected
from expo_ray.evaluation.search.methods import Trial, outcome_of
from expo_ray.evaluation.search.roles import prompts_needed
from expo_ray.report.results import FittedGain, GuardrailCheck, LooksTaken, RoleTest


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
        checked: the guardrails on the prompts that decided.
        p_value: of the confirmation, with all its looks and reward models; 1 where there was none.
        looks: at the confirming half, by each alpha that came there.
        fitted: the curve of the gain that `considered` was picked by, of the methods that fit it.
    """

    alpha: float
    reason: str
    considered: float
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...]
    look: Look | None = None
    tests: tuple[RoleTest, ...] = ()
    checked: tuple[GuardrailCheck, ...] = ()
    p_value: float = 1.0
    looks: tuple[LooksTaken, ...] = ()
    fitted: tuple[FittedGain, ...] = ()


def decide(history: History, settings: Search) -> Decision:
    """Decide a finished search, as a function of its results alone.

    Alpha is above 0 only if every reward model lets it pass in its role (`roles`), on the untouched half: the lower bound of its paired gain
    over dpo is above zero, or above the loss that the model allows. Where no half was left untouched, the bounds on the choosing half are
    corrected for the number of alphas tried.

    Raises:
        SearchError: if `next_rung` still asks for something.
    """
    outcome = outcome_of(history, settings)
    picked = outcome.picked
    rejected = {each.alpha: each for each in picked.rejected}
    if not outcome.trials:
        reason = f"keep dpo (alpha 0): {picked.fault}"
        return Decision(0.0, reason, 0.0, tuple(rejected.values()), picked.warnings, fitted=picked.fitted)
    *given_way, last = outcome.trials
    for trial in given_way:
        rejected[trial.alpha] = Rejected(trial.alpha, "confirmation", rejection(trial.checked))
    rejected.pop(last.alpha, None)
    fault = _fault(last, settings)
    if fault:
        rejected[last.alpha] = Rejected(last.alpha, "confirmation" if last.look else "gain over dpo", fault)
    return Decision(
        alpha=0.0 if fault else last.alpha,
        reason=f"keep dpo (alpha 0): {fault}" if fault else _praise(last.alpha, last.tests),
        considered=last.alpha,
        rejected=tuple(rejected[alpha] for alpha in sorted(rejected)),
        warnings=picked.warnings + tuple(check.text for check in last.checked if check.verdict == "warn"),
        look=last.look,
        tests=last.tests,
        checked=last.checked,
        p_value=_p_value(last, settings),
        looks=tuple(
            _looks_taken(trial, trial.look, history, settings) for trial in outcome.trials if trial.look
        ),
        fitted=picked.fitted,
    )


def _looks_taken(trial: Trial, last: Look, history: History, settings: Search) -> LooksTaken:
    """Where the confirmation of an alpha ended."""
    looks = looks_of(history.confirm.num_prompts, settings, guarded=history.choose.guarded)
    sizes = [look.num_prompts for look in looks]
    passed = all(test.passed for test in trial.tests)
    return LooksTaken(
        trial.alpha,
        1 + sizes.index(last.num_prompts),
        last.num_prompts,
        sizes[-1],
        "passed" if passed else "last" if last.is_last else "futile",
    )


def _p_value(trial: Trial, settings: Search) -> float:
    """The largest p value of all tests, as every model has to pass; corrected for the looks, each of which spends a part of the error."""
    if trial.look is None:
        return 1.0
    spent = (1 - trial.look.confidence) / (1 - settings.confidence)
    return min(1.0, max(test.p_value for test in trial.tests) / spent)


def _fault(trial: Trial, settings: Search) -> str:
    """The reason to keep dpo; empty if every test has passed and no guardrail rejects."""
    texts = [_shortfall(trial.alpha, test, settings) for test in trial.tests if not test.passed]
    if texts and trial.corrected_for:
        texts.append(
            f"the bounds are corrected for the {trial.corrected_for} alphas tried, and no prompts were left to confirm on; with more prompts it "
            "might show"
        )
    return "; ".join(texts) or rejection(trial.checked)


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

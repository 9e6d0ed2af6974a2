"""Methods of choosing alpha: each asks for what to evaluate next, as a function of what has been evaluated.

A new method is a name in `expo_ray.config.search` and a generator in `METHODS`, such as `grid` below.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass

from expo_ray.config import Search, format_alpha
from expo_ray.config.search import Method
from expo_ray.errors import ExpoError
from expo_ray.evaluation.search.confirmation import Look, confirm, tests_at
from expo_ray.evaluation.search.guardrails import last_checks, objection, rejection, veto
from expo_ray.evaluation.search.history import Half, History, Picked, Rejected, Rung
from expo_ray.evaluation.search.ladder import ladder, sizes_of
from expo_ray.evaluation.search.roles import role_tests
from expo_ray.evaluation.search.surface import surface
from expo_ray.evaluation.statistics import gain
from expo_ray.report.results import GuardrailCheck, RoleTest

# The fewest that a job file may ask for in a round. The standard error of a gain is then a quarter of its standard deviation.
FEWEST_PROMPTS = 16
# Part of what identifies a search: raised when it would go another way than before, or decide otherwise. 3: guardrails look at intervals, give
# way to a smaller alpha, and ask what is left of a gain at dpo's length. 4: guards have 1,000 prompts in every
# method; `surface` fits stiffer curves, and ends by how much a better alpha could add. Finished searches from the oldest version on are still read: a
# decision stands that was made by the rules of its time.
SEARCH_VERSION, OLDEST_SEARCH_VERSION = 4, 2
# Alphas that are confirmed at most, each only if a guardrail rejects the one before; a smaller one is smaller by at least this factor.
_CONFIRMED_AT_MOST, _SMALLER_BY = 3, 1.3

# Yields rungs on the choosing half, and is sent each as it was asked, when it has been evaluated.
Course = Generator[Rung, Rung, Picked]


class SearchError(ExpoError):
    """A search that cannot begin, or a decision asked for before its end."""


def grid(half: Half, settings: Search) -> Course:
    """Compare a list of alphas on the largest number of prompts; the highest mean reward wins, as in the paper."""
    size = sizes_of(half, settings)[-1]
    alphas = tuple(sorted({0.0, *settings.alphas}))
    yield Rung("choose", alphas, 0, size, "grid")
    means = dict(zip(alphas, half.rewards(alphas, size).mean(axis=0), strict=True))
    reasons = {
        alpha: "it interpolates: drawn, and never chosen"
        if alpha < 0
        else veto(half, settings, alpha, size, settings.confidence) or objection(half, alpha, size)
        for alpha in alphas
        if alpha
    }
    passed = [alpha for alpha in alphas if not reasons.get(alpha)]
    picked = max(passed, key=lambda alpha: means[alpha])
    for alpha in passed:
        if alpha not in {0.0, picked}:
            below = means[picked] - means[alpha]
            reasons[alpha] = f"its reward is {below:.3f} below alpha {format_alpha(picked)}"
    rejected = [Rejected(alpha, "grid", reason) for alpha, reason in reasons.items() if reason]
    nothing = "no alpha of the grid has a higher mean reward than dpo and passes the guardrails"
    return Picked(picked, size, tuple(rejected), fault="" if picked else nothing)


METHODS: Mapping[Method, Callable[[Half, Search], Course]] = {
    "surface": surface,
    "ladder": ladder,
    "grid": grid,
}


@dataclass(frozen=True)
class Trial:
    """An alpha before the tests that decide.

    Attributes:
        look: at the confirming half, that ended its confirmation; None where there is no such half, and the choosing one decides.
        tests: by each reward model in its role.
        checked: all guardrails.
        corrected_for: alphas tried on the prompts that decide.
    """

    alpha: float
    look: Look | None
    tests: tuple[RoleTest, ...]
    checked: tuple[GuardrailCheck, ...]
    corrected_for: int = 0

    @property
    def gives_way(self) -> bool:
        """True where only a guardrail stands against the alpha."""
        return all(test.passed for test in self.tests) and bool(rejection(self.checked))


@dataclass(frozen=True)
class Outcome:
    """Outcome of a finished search.

    Attributes:
        picked: on the choosing half.
        trials: each after the first because a guardrail rejected the one before; none where no alpha was picked.
    """

    picked: Picked
    trials: tuple[Trial, ...]


def check_size(num_prompts: int) -> None:
    """Check that the choosing half has enough prompts.

    Raises:
        SearchError: if it has not.
    """
    if num_prompts < FEWEST_PROMPTS:
        raise SearchError(
            f"there are {num_prompts} prompts to choose alpha on, half of the set; a search needs at least {FEWEST_PROMPTS}, and some "
            "hundreds to see small gains"
        )


def next_rung(history: History, settings: Search) -> Rung | None:
    """The next round of the search, or None once alpha can be decided.

    The search is played again over the stored results, each time from its beginning, and does not ask for what is stored. It
    depends on nothing else, so that a rerun continues where a killed search was, and comes to the same alpha.

    Raises:
        SearchError: if the prompts are too few for any comparison.
    """
    reached = _play(history, settings)
    return reached if isinstance(reached, Rung) else None


def outcome_of(history: History, settings: Search) -> Outcome:
    """The outcome of a finished search.

    Raises:
        SearchError: if `next_rung` still asks for something.
    """
    reached = _play(history, settings)
    if isinstance(reached, Rung):
        raise SearchError(
            f"the search is not finished: {reached.stage} needs {len(reached.alphas)} alpha(s) on {reached.num_prompts} prompts; evaluate "
            "what `next_rung` asks for first"
        )
    return reached


def looks_better(history: History, picked: Picked, settings: Search) -> bool:
    """True if the choosing half finds the picked alpha better than dpo, so that confirming it is worth its price."""
    if picked.alpha == 0 or settings.method == "surface":  # whose last round has weighed that
        return picked.alpha > 0
    return _gains(history.choose, picked.alpha, picked.num_prompts, settings)


def _gains(half: Half, alpha: float, num_prompts: int, settings: Search) -> bool:
    """True if the lower bound of an alpha's gain over dpo is above zero on the first prompts of a half."""
    rewards = half.rewards((alpha, 0.0), num_prompts)
    clusters = half.beside_dpo(alpha, num_prompts)[1].clusters
    return gain(rewards[:, 0], rewards[:, 1], settings.confidence, clusters=clusters).low > 0


def _play(history: History, settings: Search) -> Rung | Outcome:
    """Play the search over its results: the first rung that lacks some, or the outcome."""
    course = _course(history, settings)
    earlier = iter(history.asked)
    try:
        rung = _as_asked(next(course), earlier, settings)
        while not history.half(rung.half).missing(rung):
            rung = _as_asked(course.send(rung), earlier, settings)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
    return rung


def _as_asked(rung: Rung, earlier: Iterator[Rung], settings: Search) -> Rung:
    """The rung as an earlier run asked it: of `surface`, another machine may have rounded an alpha otherwise."""
    asked = next(earlier, rung)
    same = (asked.half, asked.start, asked.stop) == (rung.half, rung.start, rung.stop)
    return asked if same and settings.method == "surface" and rung.half == "choose" else rung


def _course(history: History, settings: Search) -> Generator[Rung, Rung, Outcome]:
    """The method on the choosing half, then the confirmation on the other.

    A guardrail that rejects the picked alpha there gives way to the next smaller one. The order is set on the choosing half, and an alpha is
    tested only if the gain of the one before was confirmed: so each has the whole error, and that of any false claim is no larger
    (fixed-sequence tests; Maurer, Hothorn and Lehmacher 1995).
    """
    check_size(history.choose.num_prompts)
    picked = yield from METHODS[settings.method](history.choose, settings)
    if not picked.alpha:
        return Outcome(picked, ())
    if history.confirm.num_prompts < FEWEST_PROMPTS or not looks_better(history, picked, settings):
        return Outcome(picked, (_trial_on_choosing_half(history, settings, picked),))
    trials: list[Trial] = []
    alpha = picked.alpha
    while alpha:
        look = yield from confirm(history.confirm, settings, alpha, guarded=history.choose.guarded)
        trials.append(_trial(history.confirm, settings, alpha, look))
        goes_on = trials[-1].gives_way and len(trials) < _CONFIRMED_AT_MOST
        alpha = _next_smaller(history.choose, settings, picked, alpha) if goes_on else 0.0
    return Outcome(picked, tuple(trials))


def _trial(half: Half, settings: Search, alpha: float, look: Look) -> Trial:
    scores, dpo = half.beside_dpo(alpha, look.num_prompts)
    checked = last_checks(scores, dpo, settings, half.roles, look.confidence)
    return Trial(alpha, look, tests_at(half, alpha, look), checked)


def _trial_on_choosing_half(history: History, settings: Search, picked: Picked) -> Trial:
    """The tests on the very prompts that the alpha was picked on, corrected for the number of alphas tried (Bonferroni).

    By the choosing model alone where that one sees no gain even without the correction.
    """
    roles = history.choose.roles
    scores, dpo = history.choose.beside_dpo(picked.alpha, picked.num_prompts)
    is_better = looks_better(history, picked, settings)
    tried = sum(alpha > 0 for alpha in history.choose.scores) if is_better else 0
    confidence = 1 - (1 - settings.confidence) / max(tried, 1)
    tests = role_tests("choose", scores, dpo, roles, confidence)
    checked = last_checks(scores, dpo, settings, roles, confidence)
    return Trial(picked.alpha, None, tests if is_better else tests[:1], checked, tried)


def _next_smaller(half: Half, settings: Search, picked: Picked, above: float) -> float:
    """The next alpha below `above` whose gain the choosing half shows and that no guardrail rejects there; 0 if there is none."""
    for alpha in sorted((alpha for alpha in half.scores if alpha > 0), reverse=True):
        if (
            alpha * _SMALLER_BY <= above
            and _gains(half, alpha, picked.num_prompts, settings)
            and not veto(half, settings, alpha, picked.num_prompts, settings.confidence)
        ):
            return alpha
    return 0.0

"""Methods of choosing alpha: each asks for what to evaluate next, as a function of what has been evaluated.

A new method is a name in `expo_ray.config.search` and a generator in `METHODS`, such as `grid` below.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping

from expo_ray.config import Search, format_alpha
from expo_ray.config.search import Method
from expo_ray.errors import ExpoError
from expo_ray.evaluation.search.guardrails import objection, veto
from expo_ray.evaluation.search.history import Half, History, Picked, Rejected, Rung
from expo_ray.evaluation.search.ladder import ladder, sizes_of
from expo_ray.evaluation.statistics import gain

# The fewest that a job file may ask for in a round. The standard error of a gain is then a quarter of its standard deviation.
FEWEST_PROMPTS = 16
# Part of what identifies a search: raised when it would go another way than before, or decide otherwise.
SEARCH_VERSION = 2

# Yields rungs on the choosing half; each is evaluated when the generator goes on.
Course = Generator[Rung, None, Picked]


class SearchError(ExpoError):
    """A search that cannot begin, or a decision asked for before its end."""


def grid(half: Half, settings: Search) -> Course:
    """Compare a list of alphas on the largest number of prompts; the highest mean reward wins, as in the paper."""
    size = sizes_of(half, settings)[-1]
    alphas = tuple(sorted({0.0, *settings.alphas}))
    yield Rung("choose", alphas, size, "grid")
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


METHODS: Mapping[Method, Callable[[Half, Search], Course]] = {"ladder": ladder, "grid": grid}


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
    for rung in _course(history, settings):
        if history.half(rung.half).missing(rung):
            return rung
    return None


def picked_alpha(history: History, settings: Search) -> Picked:
    """The alpha that the finished search picked.

    Raises:
        SearchError: if `next_rung` still asks for something.
    """
    course = _course(history, settings)
    while True:
        try:
            rung = next(course)
        except StopIteration as end:
            picked: Picked = end.value
            return picked
        if history.half(rung.half).missing(rung):
            raise SearchError(
                f"the search is not finished: {rung.stage} needs {len(rung.alphas)} alpha(s) on {rung.num_prompts} prompts; evaluate what "
                "`next_rung` asks for first"
            )


def looks_better(history: History, picked: Picked, confidence: float) -> bool:
    """True if the choosing half finds the picked alpha better than dpo, so that confirming it is worth its price."""
    if picked.alpha == 0:
        return False
    rewards = history.choose.rewards((picked.alpha, 0.0), picked.num_prompts)
    return gain(rewards[:, 0], rewards[:, 1], confidence).low > 0


def _course(history: History, settings: Search) -> Course:
    """The method on the choosing half, then the confirmation on the other."""
    check_size(history.choose.num_prompts)
    picked = yield from METHODS[settings.method](history.choose, settings)
    if history.confirm.num_prompts >= FEWEST_PROMPTS and looks_better(history, picked, settings.confidence):
        size = min(settings.confirm_prompts, history.confirm.num_prompts)
        yield Rung("confirm", (0.0, picked.alpha), size, "confirmation")
    return picked

"""Choosing alpha: what to evaluate next, as a function of what has been evaluated."""

from __future__ import annotations

from collections.abc import Generator

from expo_ray.config import Search
from expo_ray.errors import ExpoError
from expo_ray.evaluation.search.grid import grid
from expo_ray.evaluation.search.history import History, Rung
from expo_ray.evaluation.search.ladder import ladder
from expo_ray.evaluation.search.picked import Picked
from expo_ray.evaluation.statistics import gain

FEWEST_PROMPTS = 16
# Part of what identifies a search: raised when it would go another way than before, or decide otherwise.
SEARCH_VERSION = 2


class SearchError(ExpoError):
    """A search that cannot begin, or a decision asked for before its end."""


def check_size(num_prompts: int) -> None:
    """See that the choosing half has enough prompts.

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

    The search is played again over the stored results, each time from its beginning; what it finds there, it does not ask for. It
    depends on nothing else, so that a rerun continues where a killed search was, and comes to the same alpha.

    Raises:
        SearchError: if the prompts are too few to tell anything.
    """
    course = _course(history, settings)
    for rung in course:
        if not history.half(rung.half).has(rung):
            return rung
    return None


def picked_alpha(history: History, settings: Search) -> Picked:
    """What the finished search picked.

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
        if not history.half(rung.half).has(rung):
            raise SearchError(
                f"the search is not finished: {rung.why} needs {len(rung.alphas)} alpha(s) on {rung.num_prompts} prompts; evaluate what "
                "`next_rung` asks for first"
            )


def looks_better(history: History, picked: Picked, confidence: float) -> bool:
    """True if the choosing half finds the picked alpha better than dpo, so that confirming it is worth its price."""
    if picked.alpha == 0:
        return False
    rewards = history.choose.rewards((picked.alpha, 0.0), picked.num_prompts)
    return gain(rewards[:, 0], rewards[:, 1], confidence).low > 0


def _course(history: History, settings: Search) -> Generator[Rung, None, Picked]:
    check_size(history.choose.num_prompts)
    method = ladder if settings.method == "ladder" else grid
    picked = yield from method(history.choose, settings)
    if history.confirm.num_prompts >= FEWEST_PROMPTS and looks_better(history, picked, settings.confidence):
        size = min(settings.confirm_prompts, history.confirm.num_prompts)
        yield Rung("confirm", (0.0, picked.alpha), size, "confirmation")
    return picked

"""The search of one pair: ask for what the next rung needs, until alpha can be decided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from expo_ray.config import Search, format_alpha
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.decision import Decision, decide
from expo_ray.evaluation.search.history import Half, HalfName, History, Rung
from expo_ray.evaluation.search.methods import next_rung
from expo_ray.extrapolation.step import SFT, Step

# Answers and rewards of one step on some prompts; those that are stored are not made again.
Evaluate = Callable[[Step, PromptSet], AlphaScores]
# Takes what a search does next, or has come to, in a few words.
Tell = Callable[[str], None]


def search_pair(
    prompts: PromptSet, settings: Search, evaluate: Evaluate, tell: Tell, *, at_once: int
) -> tuple[History, Decision]:
    """Choose alpha on one half of the prompts, and confirm it on the other.

    Args:
        evaluate: safe to call from several threads.
        tell: is told each rung, and the decision.
        at_once: alphas of a rung to evaluate at the same time.

    Raises:
        ExpoError: if an alpha cannot be evaluated, or the prompts are too few.
    """
    halves = halves_of(prompts)
    history = History(Half(len(halves["choose"]), {}), Half(len(halves["confirm"]), {}))
    with ThreadPoolExecutor(at_once, "alpha") as pool:
        while rung := next_rung(history, settings):
            alphas = _missing(history, rung)
            tell(f"{rung.why}, alpha {', '.join(map(format_alpha, alphas))} on {rung.num_prompts} prompts")
            asked = first(halves[rung.half], rung.num_prompts)
            assert len(asked) == rung.num_prompts, rung  # or it would be asked for again and again
            history = _with(
                history, rung, pool.map(lambda alpha, asked=asked: evaluate(Step(alpha), asked), alphas)
            )
        decision = decide(history, settings)
        tell(decision.reason)
        # Not part of the search: where the curve of the report begins.
        smallest = min(settings.prompts[0], len(halves["choose"]))
        sft = Rung("choose", (SFT.alpha,), smallest, "sft")
        if not history.choose.has(sft):
            history = _with(history, sft, [evaluate(SFT, first(halves["choose"], smallest))])
    return history, decision


def halves_of(prompts: PromptSet) -> Mapping[HalfName, PromptSet]:
    """The half that alpha is chosen on, and the one that confirms it, each in the order in which it is asked."""
    choose, confirm = (half.drawn() for half in prompts.halves())
    return {"choose": choose, "confirm": confirm}


def first(prompts: PromptSet, count: int) -> PromptSet:
    """The first prompts of a set, in its order."""
    return replace(prompts, prompts=prompts.prompts[:count])


def _missing(history: History, rung: Rung) -> list[float]:
    known = history.half(rung.half).scores
    return [
        alpha
        for alpha in rung.alphas
        if alpha not in known or len(known[alpha].prompt_ids) < rung.num_prompts
    ]


def _with(history: History, rung: Rung, found: Iterable[AlphaScores]) -> History:
    half = history.half(rung.half)
    grown = replace(half, scores={**half.scores, **{one.alpha: one for one in found}})
    return replace(history, **{rung.half: grown})

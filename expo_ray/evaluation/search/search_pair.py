"""The search of one pair: evaluate what the next rung needs until alpha can be decided, then say what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np

from expo_ray.config import Search, format_alpha
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.search.alpha_scores import AlphaScores, Evaluator
from expo_ray.evaluation.search.decision import Decision, decide
from expo_ray.evaluation.search.guardrails import checks
from expo_ray.evaluation.search.history import HALF_NAMES, Half, History, Rung
from expo_ray.evaluation.search.methods import next_rung
from expo_ray.evaluation.search.roles import DEFAULT_ROLES, Roles
from expo_ray.evaluation.search.rung_log import RungLog
from expo_ray.evaluation.statistics import gain
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import DPO, SFT, Step
from expo_ray.report.results import AskedAgain, Example, GuardrailCheck, HalfName, PairResult

# Prompts shown in full: half of those that gained most, half of those that lost most.
NUM_EXAMPLES = 6
# Prompts on which dpo is asked again. Its answers should be the same, so that even few show a change.
_ASKED_AGAIN = 32
# Of the intervals of that change: without any, one search in a hundred warns.
_SURE = 0.99
# The search that every other one is compared with by its price: 26 log-spaced alphas and dpo, on as many prompts as the paper.
_GRID_ALPHAS, _GRID_PROMPTS = 27, 1000
_NO_CLUSTERS: Mapping[str, int] = {}


def search_pair(
    plan: PairPlan,
    prompts: PromptSet,
    settings: Search,
    evaluator: Evaluator,
    announce: Callable[[str], None],
    *,
    at_once: int,
    rung_log: RungLog | None = None,
    roles: Roles = DEFAULT_ROLES,
) -> PairResult:
    """Choose the alpha of a pair.

    Args:
        announce: takes a line for each round, and the reason of each decision.
        at_once: alphas of a rung to evaluate at the same time.
        rung_log: keeps what each rung asked, for a rerun on another machine.
        roles: of the evaluator's reward models.

    Raises:
        ExpoError: if an alpha cannot be evaluated, or the prompts are too few.
    """
    halves = halves_of(prompts)
    history, decision = search_alpha(
        halves,
        settings,
        evaluator,
        announce,
        at_once=at_once,
        rung_log=rung_log,
        roles=roles,
        clusters=prompts.clusters,
    )
    asked_again = _ask_again(history, halves, evaluator)
    confirming = decision.look.confidence if decision.look else None
    on_grid = _GRID_ALPHAS * min(_GRID_PROMPTS, len(halves["choose"])) * history.choose.scores[0.0].samples
    return PairResult(
        name=plan.name,
        sft=_pinned(plan.sft.uri, plan.sft.revision),
        dpo=_pinned(plan.dpo.uri, plan.dpo.revision),
        decision=decision.alpha,
        reason=decision.reason,
        measured=tuple(
            history.measurements(history.choose.scores, settings.confidence, confirming=confirming)
        ),
        guardrails=tuple(_guardrail_checks(history.choose, settings)),
        rejected={rejected.alpha: str(rejected) for rejected in decision.rejected},
        mean_tokens={
            alpha: float(scores.lengths.mean()) for alpha, scores in sorted(history.choose.scores.items())
        },
        examples=tuple(_examples(history.choose, decision, evaluator)),
        generations=evaluator.num_responses,
        rounding=plan.options.rounding,
        warnings=(*decision.warnings, *_drift_warnings(asked_again)),
        considered=decision.considered or None,
        tests=decision.tests,
        p_value=decision.p_value,
        prompts=_describe_clusters(prompts),
        looks=decision.looks,
        other_looks=rung_log.other_looks() if rung_log else None,
        asked_again=asked_again,
        fitted=decision.fitted,
        grid_generations=on_grid,
    )


def _ask_again(history: History, halves: Mapping[HalfName, PromptSet], evaluator: Evaluator) -> AskedAgain:
    """Ask dpo again on some of the prompts that it answered, from the first of the search to its last: an A/A comparison.

    An engine, its hardware or a reward model may have changed while the search was under way or interrupted. dpo's stored answers would
    then differ from the others by more than alpha, and a tenth of a standard deviation looks like a gain.
    """
    answered = [
        prompt
        for name in HALF_NAMES
        if 0.0 in history.half(name).scores
        for prompt in halves[name].prompts
        if prompt.id in history.half(name).scores[0.0].row_of
    ]
    spread = np.linspace(0, len(answered) - 1, min(_ASKED_AGAIN, len(answered))).round().astype(int)
    asked = replace(halves["choose"], prompts=tuple(answered[at] for at in spread))
    both = evaluator.ask_dpo_again(asked)
    changes = {
        model: gain(rewards, both.before.rewards[model], _SURE)
        for model, rewards in both.again.rewards.items()
    }
    return AskedAgain(len(asked), both.responses, both.same, changes, _SURE)


def _drift_warnings(asked_again: AskedAgain) -> Iterator[str]:
    for model, change in asked_again.drifted.items():
        yield (
            f"dpo, asked again at the end on {asked_again.prompts} of its prompts, has another reward by {model} than before: {change}, beyond "
            "chance. Engine, machine or reward model have changed, and what was compared with dpo's stored answers may be wrong: search again "
            "in an empty output folder, on machines of one kind"
        )


def search_alpha(
    halves: Mapping[HalfName, PromptSet],
    settings: Search,
    evaluator: Evaluator,
    announce: Callable[[str], None],
    *,
    at_once: int,
    rung_log: RungLog | None = None,
    roles: Roles = DEFAULT_ROLES,
    clusters: Mapping[str, int] = _NO_CLUSTERS,
) -> tuple[History, Decision]:
    """Choose alpha on one half of the prompts, and confirm it on the other; see `search_pair`."""
    choose, confirm = (Half(_ids(halves[name]), {}, roles, clusters) for name in HALF_NAMES)
    history = History(choose, confirm, rung_log.read() if rung_log else ())
    rungs: list[Rung] = []
    while rung := next_rung(history, settings):
        rungs.append(rung)
        if rung_log:
            rung_log.write(rungs)
        alphas = history.half(rung.half).missing(rung)
        announce(f"{rung.stage}, alpha {', '.join(map(format_alpha, alphas))} on {rung.num_prompts} prompts")
        asked = halves[rung.half].between(rung.start, rung.stop)
        assert len(asked) == rung.num_prompts, rung  # or it would be asked for again and again
        evaluator.expect([*map(Step, alphas), _likely_next(history.choose, rung, settings)])
        history = history.with_scores(rung.half, _evaluate(alphas, asked, evaluator, at_once))
    decision = decide(history, settings)
    announce(decision.reason)
    # Not part of the search: sft (alpha -1) as well, where the curve of the report begins.
    smallest = min(settings.prompts[0], len(halves["choose"]))
    alphas = history.choose.missing(Rung("choose", (SFT.alpha,), 0, smallest, "sft"))
    asked = halves["choose"].first(smallest)
    history = history.with_scores("choose", _evaluate(alphas, asked, evaluator, at_once))
    return history, decision


def _likely_next(choose: Half, rung: Rung, settings: Search) -> Step:
    """The step that the round after `rung` will probably begin with.

    Most rounds begin with dpo, on more prompts than before. A climb goes on with twice its last alpha on the same ones.
    """
    if rung.half == "confirm":
        return SFT
    top = max(rung.alphas)
    climbs = settings.method != "grid" and top > max(choose.scores, default=0.0)
    return Step(2 * top) if climbs and 2 * top <= settings.largest_alpha else DPO


def _ids(prompts: PromptSet) -> tuple[str, ...]:
    return tuple(prompt.id for prompt in prompts.prompts)


def halves_of(prompts: PromptSet) -> Mapping[HalfName, PromptSet]:
    """The half that alpha is chosen on, and the one that confirms it, each in the order in which it is asked."""
    choose, confirm = (half.drawn() for half in prompts.halves())
    return {"choose": choose, "confirm": confirm}


def _evaluate(
    alphas: Sequence[float], prompts: PromptSet, evaluator: Evaluator, at_once: int
) -> dict[float, AlphaScores]:
    """Evaluate alphas at the same time, each on all `prompts`."""
    with ThreadPoolExecutor(at_once, "alpha") as pool:
        scores = pool.map(lambda alpha: evaluator.evaluate(Step(alpha), prompts), alphas)
        return dict(zip(alphas, scores, strict=True))


def _describe_clusters(prompts: PromptSet) -> str:
    """Say how many prompts hang together; empty if none do."""
    sizes = Counter(prompts.clusters.values())
    shared = [size for size in sizes.values() if size > 1]
    if not shared:
        return ""
    return (
        f"{sum(shared)} of {len(prompts)} prompts are near-duplicates, or fill one of {len(shared)} templates; those of one stay in one half, "
        f"and count as one in every interval: {len(sizes)} independent ones"
    )


def _pinned(uri: str, revision: str) -> str:
    return f"{uri}@{revision}" if revision and "@" not in uri else uri


def _guardrail_checks(half: Half, settings: Search) -> Iterator[GuardrailCheck]:
    """All guardrails of all alphas but sft and dpo, each on the most prompts."""
    for alpha in sorted(half.scores):
        if alpha not in (DPO.alpha, SFT.alpha):
            yield from checks(*half.beside_dpo(alpha), settings.guardrails, settings.confidence, half.roles)


def _examples(half: Half, decision: Decision, evaluator: Evaluator) -> Iterator[Example]:
    """The prompts whose reward changed most, either way, between dpo and the alpha that was chosen or came closest."""
    step = Step(decision.considered)
    if step == DPO or step.alpha not in half.scores:
        return
    scores, dpo = half.beside_dpo(step.alpha)
    side: Literal["chosen", "candidate"] = "chosen" if decision.alpha else "candidate"
    sft = half.scored(SFT.alpha) if SFT.alpha in half.scores else None
    sides = {"sft": (SFT, sft), "dpo": (DPO, dpo), side: (step, scores)}
    model = scores.chooser
    order = np.argsort(scores.rewards[model] - dpo.rewards[model], kind="stable")
    ends = min(NUM_EXAMPLES, len(order)) // 2
    prompt_ids = [scores.prompt_ids[row] for row in [*order[::-1][:ends], *order[:ends]]]
    responses = {name: evaluator.responses(shown, prompt_ids) for name, (shown, _) in sides.items()}
    for prompt_id in prompt_ids:
        answers = {name: of_side[prompt_id] for name, of_side in responses.items() if prompt_id in of_side}
        if answers:
            yield Example(
                prompt=next(iter(answers.values())).messages[-1]["content"],
                responses={name: response.text for name, response in answers.items()},
                rewards={
                    name: _reward_at(of_side, prompt_id, model)
                    for name, (_, of_side) in sides.items()
                    if name in answers and of_side
                },
            )


def _reward_at(scores: AlphaScores, prompt_id: str, model: str) -> float:
    return float(scores.rewards[model][scores.prompt_ids.index(prompt_id)])

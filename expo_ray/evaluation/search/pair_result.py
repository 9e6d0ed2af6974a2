"""What the report tells of a searched pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from expo_ray.config import Search
from expo_ray.config.search import Limit
from expo_ray.evaluation.records import Response
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.decision import Decision
from expo_ray.evaluation.search.groups import GroupDecision
from expo_ray.evaluation.search.guardrails import checks
from expo_ray.evaluation.search.history import Half, HalfName, History
from expo_ray.evaluation.statistics import (
    Array,
    bootstrap,
    gain,
    length_controlled_gain,
    win_rate,
)
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import DPO, SFT, Step
from expo_ray.report.results import (
    Example,
    Groups,
    GroupTrial,
    GuardrailCheck,
    Interval,
    Measurement,
    PairResult,
)

# Prompts shown in full: half of those that gained most, half of those that lost most.
NUM_EXAMPLES = 6

# Responses of sample 0 by step and prompt id.
Texts = Mapping[Step, Mapping[str, Response]]


def pair_result(
    plan: PairPlan,
    history: History,
    decision: Decision,
    settings: Search,
    texts: Texts,
    *,
    generations: int,
    groups: GroupDecision | None = None,
) -> PairResult:
    """Gather measures, guardrails and examples of a finished search.

    Args:
        texts: what was answered, for the side-by-side examples.
        generations: responses drawn.
        groups: the search of multipliers, if there was one.
    """
    halves: tuple[HalfName, ...] = ("choose", "confirm")
    return PairResult(
        name=plan.name,
        sft=_named(plan.sft.uri, plan.sft.revision),
        dpo=_named(plan.dpo.uri, plan.dpo.revision),
        decision=decision.alpha,
        considered=decision.considered or None,
        reason=decision.reason,
        measured=tuple(
            one
            for half in halves
            for alpha in sorted(history.half(half).scores)
            for one in _measured(half, *_compared(history.half(half), alpha), settings.confidence)
        ),
        guardrails=tuple(_guardrails(history.choose, settings)),
        rejected={one.alpha: f"{one.stage}: {one.reason}" for one in decision.rejected},
        mean_tokens={
            alpha: float(one.lengths.mean()) for alpha, one in sorted(history.choose.scores.items())
        },
        examples=tuple(_examples(history, decision, texts, groups)),
        generations=generations,
        rounding=plan.options.rounding,
        warnings=decision.warnings,
        groups=_groups(groups, settings.confidence) if groups else None,
    )


def _named(uri: str, revision: str) -> str:
    return f"{uri}@{revision}" if revision and "@" not in uri else uri


def _measured(half: HalfName, one: AlphaScores, dpo: AlphaScores, confidence: float) -> Iterator[Measurement]:
    for model, rewards in one.rewards.items():
        before = dpo.rewards[model]
        yield Measurement(
            alpha=one.alpha,
            half=half,
            reward_model=model,
            prompts=len(one.prompt_ids),
            reward=_mean(rewards, confidence),
            gain=gain(rewards, before, confidence),
            controlled_gain=length_controlled_gain(rewards, before, one.lengths, dpo.lengths, confidence),
            win_rate=win_rate(rewards, before, confidence).mean,
        )


def _groups(groups: GroupDecision, confidence: float) -> Groups:
    chosen = bool(groups.step.factors)
    return Groups(
        multipliers=dict(groups.step.factors),
        reason=groups.reason,
        trials=tuple(
            GroupTrial(dict(one.step.factors), one.num_prompts, one.gain, one.fell) for one in groups.trials
        ),
        measured=tuple(
            one
            for half, found in groups.found.items()
            for one in _measured(half, found[groups.step], found[DPO], confidence)
        )
        if chosen
        else (),
    )


def _guardrails(half: Half, settings: Search) -> Iterator[GuardrailCheck]:
    for alpha in sorted(half.scores):
        if alpha in (DPO.alpha, SFT.alpha):
            continue
        one, dpo = _compared(half, alpha)
        for check in checks(one, dpo, settings.guardrails, settings.confidence):
            limit: Limit | None = getattr(settings.guardrails, check.name.replace(" ", "_"), None)
            rejects, warns = (limit.reject, limit.warn) if limit else (check.limit, None)
            yield GuardrailCheck(alpha, check.name, check.value, rejects, check.verdict, check.text, warns)


def _compared(half: Half, alpha: float) -> tuple[AlphaScores, AlphaScores]:
    """An alpha and dpo on all prompts that both were evaluated on."""
    size = min(len(half.scores[one].prompt_ids) for one in (0.0, alpha))
    return half.at(alpha, size), half.at(0.0, size)


def _mean(rewards: Array, confidence: float) -> Interval:
    return bootstrap(rewards[:, None], lambda means: means[..., 0], confidence)


def _examples(
    history: History, decision: Decision, texts: Texts, groups: GroupDecision | None
) -> Iterator[Example]:
    """The prompts whose reward changed most, either way, between dpo and the step that was chosen or came closest."""
    half, shown = history.choose, Step(decision.considered)
    if shown == DPO or shown.alpha not in half.scores:
        return
    one, dpo = _compared(half, shown.alpha)
    if groups and groups.step.factors:
        shown = groups.step
        one, dpo = groups.found["choose"][shown], groups.found["choose"][DPO]
    model = next(iter(one.rewards))
    change = one.rewards[model] - dpo.rewards[model]
    key: Literal["chosen", "candidate"] = "chosen" if decision.alpha else "candidate"
    named = {"sft": (SFT, half.scores.get(SFT.alpha)), "dpo": (DPO, dpo), key: (shown, one)}
    order = np.argsort(change, kind="stable")
    ends = min(NUM_EXAMPLES, len(order)) // 2
    for row in [*order[::-1][:ends], *order[:ends]]:
        prompt_id = one.prompt_ids[row]
        found = {name: texts.get(step, {}).get(prompt_id) for name, (step, _) in named.items()}
        answered = {name: response for name, response in found.items() if response}
        if not answered:
            continue
        yield Example(
            prompt=next(iter(answered.values())).messages[-1]["content"],
            responses={name: response.text for name, response in answered.items()},
            rewards={
                name: _reward_at(evaluated, prompt_id, model)
                for name, (_, evaluated) in named.items()
                if name in answered and evaluated
            },
        )


def _reward_at(one: AlphaScores, prompt_id: str, model: str) -> float:
    return float(one.rewards[model][one.prompt_ids.index(prompt_id)])

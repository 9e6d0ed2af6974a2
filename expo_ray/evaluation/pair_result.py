"""What the report tells of a searched pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from expo_ray.config import Search
from expo_ray.config.search import Limit
from expo_ray.evaluation.decision import Decision
from expo_ray.evaluation.evaluated import Evaluated
from expo_ray.evaluation.guardrails import checks
from expo_ray.evaluation.history import Half, HalfName, History
from expo_ray.evaluation.pair_search import SFT_ALPHA
from expo_ray.evaluation.records import Response
from expo_ray.evaluation.statistics import (
    Array,
    Interval,
    bootstrap,
    gain,
    length_controlled_gain,
    win_rate,
)
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.report.results import Estimate, Example, Guardrail, Measured, PairResult

# Prompts shown in full: half of those that gained most, half of those that lost most.
NUM_EXAMPLES = 6

# Responses of sample 0 by alpha and prompt id.
Texts = Mapping[float, Mapping[str, Response]]


def pair_result(
    plan: PairPlan, history: History, decision: Decision, settings: Search, texts: Texts
) -> PairResult:
    """Gather measures, guardrails and examples of a finished search.

    Args:
        texts: what was answered, for the side-by-side examples.
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
            one for half in halves for one in _measured(half, history.half(half), settings.confidence)
        ),
        guardrails=tuple(_guardrails(history.choose, settings)),
        rejected={one.alpha: f"{one.stage}: {one.reason}" for one in decision.rejected},
        mean_tokens={
            alpha: float(one.lengths.mean()) for alpha, one in sorted(history.choose.evaluated.items())
        },
        examples=tuple(_examples(history, decision, texts)),
        generations=decision.generations,
        rounding=plan.options.rounding,
        warnings=decision.warnings,
    )


def _named(uri: str, revision: str) -> str:
    return f"{uri}@{revision}" if revision and "@" not in uri else uri


def _measured(name: HalfName, half: Half, confidence: float) -> Iterator[Measured]:
    for alpha in sorted(half.evaluated):
        one, dpo = _compared(half, alpha)
        for model, rewards in one.rewards.items():
            before = dpo.rewards[model]
            yield Measured(
                alpha=alpha,
                half=name,
                reward_model=model,
                prompts=len(one.prompt_ids),
                reward=_estimate(_mean(rewards, confidence)),
                gain=_estimate(gain(rewards, before, confidence)),
                controlled_gain=_estimate(
                    length_controlled_gain(rewards, before, one.lengths, dpo.lengths, confidence)
                ),
                win_rate=win_rate(rewards, before, confidence).value,
            )


def _guardrails(half: Half, settings: Search) -> Iterator[Guardrail]:
    for alpha in sorted(half.evaluated):
        if alpha in (0.0, SFT_ALPHA):
            continue
        one, dpo = _compared(half, alpha)
        for check in checks(one, dpo, settings.guardrails, settings.confidence):
            limit: Limit | None = getattr(settings.guardrails, check.name.replace(" ", "_"), None)
            rejects, warns = (limit.reject, limit.warn) if limit else (check.limit, None)
            yield Guardrail(alpha, check.name, check.value, rejects, check.verdict, check.text, warns)


def _compared(half: Half, alpha: float) -> tuple[Evaluated, Evaluated]:
    """An alpha and dpo on all prompts that both were evaluated on."""
    size = min(len(half.evaluated[one].prompt_ids) for one in (0.0, alpha))
    return half.at(alpha, size), half.at(0.0, size)


def _mean(rewards: Array, confidence: float) -> Interval:
    return bootstrap(rewards[:, None], lambda means: means[..., 0], confidence)


def _estimate(interval: Interval) -> Estimate:
    return Estimate(interval.value, interval.low, interval.high)


def _examples(history: History, decision: Decision, texts: Texts) -> Iterator[Example]:
    """The prompts whose reward changed most, either way, between dpo and the alpha that was chosen or came closest."""
    half, shown = history.choose, decision.considered
    if shown == 0 or shown not in half.evaluated:
        return
    one, dpo = _compared(half, shown)
    model = next(iter(one.rewards))
    change = one.rewards[model] - dpo.rewards[model]
    key: Literal["chosen", "candidate"] = "chosen" if decision.alpha else "candidate"
    named: Sequence[tuple[str, float]] = (("sft", SFT_ALPHA), ("dpo", 0.0), (key, shown))
    order = np.argsort(change, kind="stable")
    ends = min(NUM_EXAMPLES, len(order)) // 2
    for row in [*order[::-1][:ends], *order[:ends]]:
        prompt_id = one.prompt_ids[row]
        found = {name: texts.get(alpha, {}).get(prompt_id) for name, alpha in named}
        answered = {name: response for name, response in found.items() if response}
        if not answered:
            continue
        yield Example(
            prompt=next(iter(answered.values())).messages[-1]["content"],
            responses={name: response.text for name, response in answered.items()},
            rewards={
                name: _reward_at(half, alpha, prompt_id, model) for name, alpha in named if name in answered
            },
        )


def _reward_at(half: Half, alpha: float, prompt_id: str, model: str) -> float:
    one = half.evaluated[alpha]
    return float(one.rewards[model][one.prompt_ids.index(prompt_id)])

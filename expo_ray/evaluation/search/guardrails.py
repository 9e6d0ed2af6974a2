"""What an alpha may change in the responses, whatever its reward.

Reward models have blind spots, and a search finds them: loops, ever longer texts, missing ends. Each guardrail compares an
alpha with dpo on the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from expo_ray.config.search import Guardrails, Limit
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.statistics import Array, gain

Verdict = Literal["ok", "warn", "reject"]


@dataclass(frozen=True)
class Check:
    """One guardrail at one alpha.

    Attributes:
        name: `length ratio`, `cut`, `repetition`, `broken`, `kl` or `reward of <model>`.
        value: what the limits are about.
        limit: the limit that counts: of the verdict, or the one that would warn.
        verdict: `reject` keeps the alpha from being chosen.
        text: the values in a sentence.
    """

    name: str
    value: float
    limit: float
    verdict: Verdict
    text: str


def checks(one: AlphaScores, dpo: AlphaScores, limits: Guardrails, confidence: float) -> tuple[Check, ...]:
    """All guardrails of an alpha, against dpo on the same prompts.

    Args:
        confidence: at which another reward model has to be below dpo for its veto.
    """
    return tuple(
        [_length(one, dpo, limits.length_ratio)]
        + [
            _rise(name, _MEANS[name], before, after, limit)
            for name, before, after, limit in (
                ("cut", dpo.cut, one.cut, limits.cut),
                ("repetition", dpo.repetition, one.repetition, limits.repetition),
                ("broken", dpo.broken, one.broken, limits.broken),
            )
        ]
        + list(_divergence(one, limits.kl))
        + list(_other_rewards(one, dpo, confidence))
    )


def rejection(found: tuple[Check, ...]) -> str:
    """What rejects an alpha, in words; empty if nothing does."""
    return "; ".join(check.text for check in found if check.verdict == "reject")


_MEANS = {
    "cut": "of responses end at the token limit",
    "repetition": "of the text repeats what the response said before",
    "broken": "of responses are empty or contain special tokens",
}


def _verdict(value: float, limit: Limit) -> tuple[Verdict, float]:
    if value > limit.reject:
        return "reject", limit.reject
    return ("warn" if value > limit.warn else "ok"), limit.warn


def _length(one: AlphaScores, dpo: AlphaScores, limit: Limit) -> Check:
    before, after = float(dpo.lengths.mean()), float(one.lengths.mean())
    # Twice as short is as suspicious as twice as long.
    ratio = after / before if before else np.inf if after else 1.0
    verdict, at = _verdict(max(ratio, 1 / ratio if ratio else np.inf), limit)
    shown = at if ratio >= 1 else 1 / at
    return Check(
        "length ratio",
        ratio,
        shown,
        verdict,
        f"responses have {after:.0f} tokens where dpo's have {before:.0f}, x{ratio:.2f} ({_against(verdict, f'x{shown:.2f}')})",
    )


def _rise(name: str, what: str, dpo: Array, one: Array, limit: Limit) -> Check:
    before, after = float(dpo.mean()), float(one.mean())
    verdict, at = _verdict(after - before, limit)
    return Check(
        name,
        after - before,
        at,
        verdict,
        f"{after:.1%} {what}, {before:.1%} with dpo ({_against(verdict, f'{at:+.1%}')})",
    )


def _divergence(one: AlphaScores, limit: Limit) -> Iterator[Check]:
    if one.divergence is not None and one.divergence[:, 1].sum() > 0:
        total, count = one.divergence.sum(axis=0)
        verdict, at = _verdict(float(total / count), limit)
        yield Check(
            "kl",
            float(total / count),
            at,
            verdict,
            f"KL from dpo is {total / count:.3f} nats per token of dpo's responses ({_against(verdict, f'{at:g}')})",
        )


def _other_rewards(one: AlphaScores, dpo: AlphaScores, confidence: float) -> Iterator[Check]:
    """The reward models that do not choose: an alpha that one of them finds worse than dpo has not improved the model."""
    for name in list(one.rewards)[1:]:
        found = gain(one.rewards[name], dpo.rewards[name], confidence)
        worse = found.high < 0
        text = f"{name} finds it {'worse than' if worse else 'no worse than'} dpo, by {found}"
        yield Check(f"reward of {name}", found.mean, 0.0, "reject" if worse else "ok", text)


def _against(verdict: Verdict, limit: str) -> str:
    return {"ok": f"limit {limit}", "warn": f"above {limit}", "reject": f"rejected beyond {limit}"}[verdict]

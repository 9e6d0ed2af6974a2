"""Limits on what an alpha may change in the responses, whatever its reward.

Reward models have blind spots, and a search finds them: loops, ever longer texts, missing ends. Each guardrail compares an
alpha with dpo on the same prompts. Their names, units and limits are in `expo_ray.config.guardrails`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from expo_ray.config import Guardrails, Limit, Search
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.history import Half
from expo_ray.evaluation.search.response_measures import RESPONSE_MEASURES
from expo_ray.evaluation.search.roles import DEFAULT_ROLES, Roles
from expo_ray.evaluation.statistics import (
    Array,
    Clusters,
    bootstrap,
    gain,
    length_controlled_gain,
    standard_error,
)
from expo_ray.report.results import GuardrailCheck, Verdict

# Where dpo itself is cut as often, the limit of tokens is too low for the prompts, and says little of alpha.
_NEARLY_ALWAYS = 0.8
# Responses whose mean lengths differ by less than this factor count as equally long.
_AS_LONG = 1.05


def checks(
    scores: AlphaScores,
    dpo: AlphaScores,
    limits: Guardrails,
    confidence: float,
    roles: Roles = DEFAULT_ROLES,
    *,
    suspects_only: bool = False,
) -> tuple[GuardrailCheck, ...]:
    """Compare an alpha with dpo on the same prompts, by every guardrail.

    Args:
        confidence: at which another reward model has to be below dpo, or below its margin, for its veto.
        roles: of the reward models.
        suspects_only: leaves out the reward models that cannot reject the alpha, which need no interval then.
    """
    return (
        _check_length(scores, dpo, limits.limit("length ratio")),
        *(_check_rise(name, scores, dpo, limits.limit(name)) for name in RESPONSE_MEASURES),
        *_check_divergence(scores, limits.limit("kl")),
        *_check_other_rewards(scores, dpo, confidence, roles, suspects_only=suspects_only),
    )


def last_checks(
    scores: AlphaScores, dpo: AlphaScores, settings: Search, roles: Roles, deciding: float
) -> tuple[GuardrailCheck, ...]:
    """All guardrails on the prompts that decide, and what of the gain is left at dpo's length.

    Args:
        deciding: confidence of the test of the gain.
    """
    checked = checks(scores, dpo, settings.guardrails, settings.confidence, roles)
    return (*checked, bought_with_length(scores, dpo, settings.guardrails.bought, deciding))


def rejection(checked: Iterable[GuardrailCheck]) -> str:
    """The reasons to reject an alpha, in words; empty if no guardrail does."""
    return "; ".join(check.text for check in checked if check.verdict == "reject")


def veto(half: Half, settings: Search, alpha: float, num_prompts: int, confidence: float) -> str:
    """The guardrails' reasons to reject an alpha on those of a half's first prompts that it was asked; empty if there are none."""
    scores, dpo = half.beside_dpo(alpha, num_prompts)
    return rejection(checks(scores, dpo, settings.guardrails, confidence, half.roles, suspects_only=True))


def objection(half: Half, alpha: float, num_prompts: int) -> str:
    """Reason to drop `alpha` before the confirmation; empty if there is none.

    A model that asks for a gain scores the alpha more than one standard error below dpo: the chance that it truly prefers the alpha is then
    below one in six. Or one that lets a small loss pass sees more of a loss than that. Earlier looks take a significant loss (`veto`).
    """
    scores, dpo = half.beside_dpo(alpha, num_prompts)
    for model, criterion in half.others():
        rewards, of_dpo = scores.rewards[model], dpo.rewards[model]
        loss, error = float((of_dpo - rewards).mean()), standard_error(rewards, of_dpo, clusters=dpo.clusters)
        seen = f"gives it {loss:.3f} less than dpo on {len(dpo.prompt_ids)} prompts"
        if criterion.allows_loss and loss > -criterion.limit(rewards - of_dpo):
            return f"{model} guards, and {seen}, more than its margin of {-criterion.limit(rewards - of_dpo):.3f}"
        if not criterion.allows_loss and loss > error:
            return f"{model} has to confirm it, and {seen}, where the standard error is {error:.3f}"
    return ""


def bought_with_length(
    scores: AlphaScores, dpo: AlphaScores, limit: Limit, confidence: float = 0.95
) -> GuardrailCheck:
    """Check how much of the gain is left at dpo's length, by the model that chooses, for an alpha whose gain is shown.

    It is asked once, on the prompts that decide: on few prompts, a share of a small gain can be anything.

    Args:
        confidence: at which a gain at dpo's length counts as shown: that of the test which decides.
    """
    rewards, of_dpo = scores.rewards[scores.chooser], dpo.rewards[scores.chooser]
    gained = float((rewards - of_dpo).mean())
    ratio = (1 + float(scores.lengths.mean())) / (1 + float(dpo.lengths.mean()))
    name = "bought with length"
    if abs(math.log(ratio)) <= math.log(_AS_LONG):
        text = f"responses are about as long as dpo's, x{ratio:.2f}"
        return GuardrailCheck(scores.alpha, name, 0.0, limit.reject, "ok", text, limit.warn)
    lengths = scores.lengths, dpo.lengths
    left = length_controlled_gain(rewards, of_dpo, *lengths, confidence, clusters=dpo.clusters)
    gone = 1 - left.mean / gained if gained > 0 else 0.0
    shown = left.low > 0
    verdict: Verdict = "warn" if gone > limit.warn or not shown else "ok"
    verdict = "reject" if gone > limit.reject and not shown else verdict
    text = (
        f"of the gain of {gained:+.3f} by {scores.chooser}, {left} is left at dpo's length: {gone:.0%} is gone, with responses x{ratio:.2f} as long"
        + (f" (rejected beyond {limit.reject:.0%})" if verdict == "reject" else "")
    )
    return GuardrailCheck(scores.alpha, name, gone, limit.reject, verdict, text, limit.warn)


def _judge(value: float, limit: Limit, near_end: Callable[[], float]) -> tuple[Verdict, float]:
    """The verdict on a value, and the limit to name beside it: the one it exceeds, else the one that would warn.

    Args:
        near_end: gives the end of the value's interval that is nearer to dpo. Few prompts show a value past `reject` by chance: it has to be
            past `warn` for certain.
    """
    if value > limit.reject and near_end() > limit.warn:
        return "reject", limit.reject
    return ("warn" if value > limit.warn else "ok"), limit.warn


def _check_length(scores: AlphaScores, dpo: AlphaScores, limit: Limit) -> GuardrailCheck:
    before, after = float(dpo.lengths.mean()), float(scores.lengths.mean())
    ratio = after / before if before else np.inf if after else 1.0
    # Half as long is as suspicious as twice as long.
    longer, shorter = (scores.lengths, dpo.lengths) if ratio >= 1 else (dpo.lengths, scores.lengths)
    verdict, exceeded = _judge(
        max(ratio, 1 / ratio if ratio else np.inf), limit, lambda: _least_ratio(longer, shorter, dpo.clusters)
    )
    named = f"x{exceeded if ratio >= 1 else 1 / exceeded:.2f}"
    text = f"responses have {after:.0f} tokens where dpo's have {before:.0f}, x{ratio:.2f} ({_against(verdict, named)})"
    return GuardrailCheck(scores.alpha, "length ratio", ratio, limit.reject, verdict, text, limit.warn)


def _least_ratio(longer: Array, shorter: Array, clusters: Clusters | None) -> float:
    """Lower end of the interval of a ratio of means; infinite where what is shorter is empty."""
    if not shorter.any() or len(longer) < 2:
        return np.inf
    return bootstrap(np.stack([longer, shorter], axis=1), _ratio, clusters=clusters).low


def _ratio(means: Array) -> Array:
    return np.asarray(means[..., 0] / np.maximum(means[..., 1], 1e-9), np.float64)


def _check_rise(name: str, scores: AlphaScores, dpo: AlphaScores, limit: Limit) -> GuardrailCheck:
    of_dpo, of_alpha = dpo.measures[name], scores.measures[name]
    before, after = float(of_dpo.mean()), float(of_alpha.mean())
    verdict, exceeded = _judge(after - before, limit, lambda: _least_rise(of_alpha, of_dpo, dpo.clusters))
    note = ""
    if verdict == "reject" and name == "cut" and before >= _NEARLY_ALWAYS:
        verdict, note = "warn", "; dpo itself seldom comes to an end: raise `sampling.max_tokens`"
    meaning = RESPONSE_MEASURES[name].meaning
    text = f"{after:.1%} {meaning}, {before:.1%} with dpo ({_against(verdict, f'{exceeded:+.1%}')}){note}"
    return GuardrailCheck(scores.alpha, name, after - before, limit.reject, verdict, text, limit.warn)


def _least_rise(of_alpha: Array, of_dpo: Array, clusters: Clusters | None) -> float:
    return gain(of_alpha, of_dpo, clusters=clusters).low if len(of_alpha) > 1 else np.inf


def _check_divergence(scores: AlphaScores, limit: Limit) -> Iterator[GuardrailCheck]:
    """KL divergence, where log-probabilities were collected."""
    if scores.divergence is not None and scores.divergence[:, 1].sum() > 0:
        sums = scores.divergence[scores.divergence[:, 1] > 0]
        total, num_tokens = sums.sum(axis=0)
        nats = float(total / num_tokens)
        verdict, exceeded = _judge(
            nats, limit, lambda: bootstrap(sums, _ratio).low if len(sums) > 1 else np.inf
        )
        text = f"KL from dpo is {nats:.3f} nats per token of dpo's responses ({_against(verdict, f'{exceeded:g}')})"
        yield GuardrailCheck(scores.alpha, "kl", nats, limit.reject, verdict, text, limit.warn)


def _check_other_rewards(
    scores: AlphaScores, dpo: AlphaScores, confidence: float, roles: Roles, *, suspects_only: bool
) -> Iterator[GuardrailCheck]:
    """The reward models that do not choose: none of them may find the alpha worse than dpo, or worse by more than its margin."""
    for model, criterion in roles.others(scores.rewards):
        differences = scores.rewards[model] - dpo.rewards[model]
        limit = criterion.limit(differences)
        if suspects_only and differences.mean() >= limit:
            continue
        gained = gain(scores.rewards[model], dpo.rewards[model], confidence, clusters=dpo.clusters)
        worse = gained.high < limit
        beyond = f" by more than {-limit:.3f} ({criterion.margin:g} standard deviations)" if limit else ""
        text = f"{model} finds it {'worse' if worse else 'no worse'} than dpo{beyond}: {gained}"
        verdict: Verdict = "reject" if worse else "ok"
        yield GuardrailCheck(scores.alpha, f"reward of {model}", gained.mean, limit, verdict, text)


def _against(verdict: Verdict, limit: str) -> str:
    return {"ok": f"limit {limit}", "warn": f"above {limit}", "reject": f"rejected beyond {limit}"}[verdict]

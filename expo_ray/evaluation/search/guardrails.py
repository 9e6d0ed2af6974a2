"""Limits on what an alpha may change in the responses, whatever its reward.

Reward models have blind spots, and a search finds them: loops, ever longer texts, missing ends. Each guardrail compares an
alpha with dpo on the same prompts. Their names, units and limits are in `expo_ray.config.guardrails`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from expo_ray.config import Guardrails, Limit, Search
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.history import Half
from expo_ray.evaluation.search.response_measures import RESPONSE_MEASURES
from expo_ray.evaluation.search.roles import DEFAULT_ROLES, Roles
from expo_ray.evaluation.statistics import gain, standard_error
from expo_ray.report.results import GuardrailCheck, Verdict


def checks(
    scores: AlphaScores, dpo: AlphaScores, limits: Guardrails, confidence: float, roles: Roles = DEFAULT_ROLES
) -> tuple[GuardrailCheck, ...]:
    """Compare an alpha with dpo on the same prompts, by every guardrail.

    Args:
        confidence: at which another reward model has to be below dpo, or below its margin, for its veto.
        roles: of the reward models.
    """
    return (
        _check_length(scores, dpo, limits.limit("length ratio")),
        *(_check_rise(name, scores, dpo, limits.limit(name)) for name in RESPONSE_MEASURES),
        *_check_divergence(scores, limits.limit("kl")),
        *_check_other_rewards(scores, dpo, confidence, roles),
    )


def rejection(checked: Iterable[GuardrailCheck]) -> str:
    """The reasons to reject an alpha, in words; empty if no guardrail does."""
    return "; ".join(check.text for check in checked if check.verdict == "reject")


def veto(half: Half, settings: Search, alpha: float, num_prompts: int, confidence: float) -> str:
    """The guardrails' reasons to reject an alpha on those of a half's first prompts that it was asked; empty if there are none."""
    scores, dpo = half.beside_dpo(alpha, num_prompts)
    return rejection(checks(scores, dpo, settings.guardrails, confidence, half.roles))


def objection(half: Half, alpha: float, num_prompts: int) -> str:
    """Reason to drop `alpha` before the confirmation; empty if there is none.

    A model that asks for a gain scores the alpha more than one standard error below dpo: the chance that it truly prefers the alpha is then
    below one in six. Or one that lets a small loss pass sees more of a loss than that. Earlier looks take a significant loss (`veto`).
    """
    scores, dpo = half.beside_dpo(alpha, num_prompts)
    for model, criterion in half.others():
        rewards, of_dpo = scores.rewards[model], dpo.rewards[model]
        loss, error = float((of_dpo - rewards).mean()), standard_error(rewards, of_dpo)
        seen = f"gives it {loss:.3f} less than dpo on {len(dpo.prompt_ids)} prompts"
        if criterion.allows_loss and loss > -criterion.limit(rewards - of_dpo):
            return f"{model} guards, and {seen}, more than its margin of {-criterion.limit(rewards - of_dpo):.3f}"
        if not criterion.allows_loss and loss > error:
            return f"{model} has to confirm it, and {seen}, where the standard error is {error:.3f}"
    return ""


def _judge(value: float, limit: Limit) -> tuple[Verdict, float]:
    """The verdict on a value, and the limit to name beside it: the one it exceeds, else the one that would warn."""
    if value > limit.reject:
        return "reject", limit.reject
    return ("warn" if value > limit.warn else "ok"), limit.warn


def _check_length(scores: AlphaScores, dpo: AlphaScores, limit: Limit) -> GuardrailCheck:
    before, after = float(dpo.lengths.mean()), float(scores.lengths.mean())
    ratio = after / before if before else np.inf if after else 1.0
    # Half as long is as suspicious as twice as long.
    verdict, exceeded = _judge(max(ratio, 1 / ratio if ratio else np.inf), limit)
    named = f"x{exceeded if ratio >= 1 else 1 / exceeded:.2f}"
    text = f"responses have {after:.0f} tokens where dpo's have {before:.0f}, x{ratio:.2f} ({_against(verdict, named)})"
    return GuardrailCheck(scores.alpha, "length ratio", ratio, limit.reject, verdict, text, limit.warn)


def _check_rise(name: str, scores: AlphaScores, dpo: AlphaScores, limit: Limit) -> GuardrailCheck:
    before, after = float(dpo.measures[name].mean()), float(scores.measures[name].mean())
    verdict, exceeded = _judge(after - before, limit)
    meaning = RESPONSE_MEASURES[name].meaning
    text = f"{after:.1%} {meaning}, {before:.1%} with dpo ({_against(verdict, f'{exceeded:+.1%}')})"
    return GuardrailCheck(scores.alpha, name, after - before, limit.reject, verdict, text, limit.warn)


def _check_divergence(scores: AlphaScores, limit: Limit) -> Iterator[GuardrailCheck]:
    """KL divergence, where log-probabilities were collected."""
    if scores.divergence is not None and scores.divergence[:, 1].sum() > 0:
        total, num_tokens = scores.divergence.sum(axis=0)
        nats = float(total / num_tokens)
        verdict, exceeded = _judge(nats, limit)
        text = f"KL from dpo is {nats:.3f} nats per token of dpo's responses ({_against(verdict, f'{exceeded:g}')})"
        yield GuardrailCheck(scores.alpha, "kl", nats, limit.reject, verdict, text, limit.warn)


def _check_other_rewards(
    scores: AlphaScores, dpo: AlphaScores, confidence: float, roles: Roles
) -> Iterator[GuardrailCheck]:
    """The reward models that do not choose: none of them may find the alpha worse than dpo, or worse by more than its margin."""
    for model, criterion in roles.others(scores.rewards):
        gained = gain(scores.rewards[model], dpo.rewards[model], confidence)
        limit = criterion.limit(scores.rewards[model] - dpo.rewards[model])
        worse = gained.high < limit
        beyond = f" by more than {-limit:.3f} ({criterion.margin:g} standard deviations)" if limit else ""
        text = f"{model} finds it {'worse' if worse else 'no worse'} than dpo{beyond}: {gained}"
        verdict: Verdict = "reject" if worse else "ok"
        yield GuardrailCheck(scores.alpha, f"reward of {model}", gained.mean, limit, verdict, text)


def _against(verdict: Verdict, limit: str) -> str:
    return {"ok": f"limit {limit}", "warn": f"above {limit}", "reject": f"rejected beyond {limit}"}[verdict]

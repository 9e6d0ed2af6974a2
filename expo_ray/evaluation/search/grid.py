"""The paper's search: a list of alphas on the same prompts, the highest mean reward wins."""

from __future__ import annotations

from collections.abc import Generator

from expo_ray.config import Search, format_alpha
from expo_ray.evaluation.search.history import Half, Rung
from expo_ray.evaluation.search.picked import Picked, Rejected, objection, sizes_of, veto


def grid(half: Half, settings: Search) -> Generator[Rung, None, Picked]:
    """Search on the choosing half: one rung, on the largest number of prompts."""
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
            reasons[alpha] = (
                f"its reward is {means[picked] - means[alpha]:.3f} below alpha {format_alpha(picked)}"
            )
    rejected = [Rejected(alpha, "grid", reason) for alpha, reason in reasons.items() if reason]
    fault = (
        "" if picked else "no alpha of the grid has a higher mean reward than dpo and passes the guardrails"
    )
    return Picked(picked, size, tuple(rejected), fault=fault)

"""The top of a reward curve, from a few measured alphas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def top_of(alphas: Sequence[float], gains: Sequence[float], num_prompts: Sequence[int]) -> float | None:
    """The maximum of a quadratic in log alpha, within the range of `alphas`.

    Args:
        alphas: above 0.
        gains: mean reward over dpo of each.
        num_prompts: behind each gain; least squares weighs by it.

    Returns:
        The alpha, in two digits; None where there are fewer than three alphas or the curve has no maximum.
    """
    if len(alphas) < 3:
        return None
    log_alpha = np.log(np.asarray(alphas))
    centre = log_alpha.mean()
    curvature, slope, _ = np.polyfit(log_alpha - centre, np.asarray(gains), 2, w=np.sqrt(num_prompts))
    if curvature >= 0:
        return None
    at = min(max(centre - slope / (2 * curvature), log_alpha.min()), log_alpha.max())
    return rounded(math.exp(at), 2)


def rounded(alpha: float, digits: int) -> float:
    """To a few digits, which name a folder well and are finer than any search can tell."""
    return float(f"{alpha:.{digits}g}")

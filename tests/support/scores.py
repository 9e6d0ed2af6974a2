"""Scores of an alpha for tests of the search: harmless responses unless a test says otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.response_measures import RESPONSE_MEASURES
from expo_ray.evaluation.statistics import Array


def scores_of(
    alpha: float,
    prompt_ids: Sequence[str],
    rewards: Mapping[str, Array],
    *,
    length: float | Array = 200.0,
    measures: Mapping[str, Array] | None = None,
) -> AlphaScores:
    """Scores with these rewards.

    Args:
        length: of each response, or of all.
        measures: those that are not 0 for all prompts, by name in `RESPONSE_MEASURES`.
    """
    zero = np.zeros(len(prompt_ids))
    return AlphaScores(
        alpha,
        tuple(prompt_ids),
        rewards,
        lengths=zero + length,
        measures={**dict.fromkeys(RESPONSE_MEASURES, zero), **(measures or {})},
    )

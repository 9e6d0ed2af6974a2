"""Many alphas compared with each other, several times, on the same prompts.

A search that looks at its data again and again, and each time at many alphas, finds a "significant" difference sooner or later. Two
corrections hold the chance that the best alpha is ever dropped below `1 - confidence`:

- within a look, an alpha is compared with all others at once: its largest studentised deficit must exceed what the largest of them
  reaches in the bootstrap, which is resampled jointly and so knows how the alphas hang together (max-T);
- over the looks, the error is spent in equal parts: each look has `(1 - confidence) / looks` (Bonferroni), whatever the others saw.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expo_ray.evaluation.statistics import NORMAL, Array, resampled_deviations


def losers(rewards: Array, level: float) -> NDArray[np.bool_]:
    """Which columns are significantly below some other one.

    Args:
        rewards: (prompts, alphas), paired by prompt.
        level: largest chance that a column which no other one truly exceeds is among the losers.
    """
    num_prompts, num_alphas = rewards.shape
    means = rewards.mean(axis=0)
    covariance = np.atleast_2d(np.cov(rewards, rowvar=False))
    variances = np.diag(covariance)
    errors = np.sqrt(np.maximum(variances[:, None] + variances[None, :] - 2 * covariance, 0) / num_prompts)
    # Identical columns have no error and no difference; the infinity makes each deficit between them 0.
    errors[errors <= 1e-12] = np.inf
    deficits = (means[None, :] - means[:, None]) / errors
    # The largest of several deficits has no smaller critical value than one has: below that, there is nothing to resample.
    suspects = np.flatnonzero(deficits.max(axis=1) > NORMAL.inv_cdf(1 - level))
    lost = np.zeros(num_alphas, bool)
    if len(suspects):
        deviations = resampled_deviations(rewards)
        for one in suspects:
            largest = ((deviations - deviations[:, [one]]) / errors[one]).max(axis=1)
            lost[one] = deficits[one].max() > np.quantile(largest, 1 - level)
    return lost

"""The search by rounds of comparisons: a climb, a race on more and more prompts, a fit.

1. Climb: double alpha until the reward falls or a guardrail trips.
2. Race: compare alphas around the best step, on more and more prompts.
3. Fit: add the top of a curve through what was measured, and compare on all prompts.
4. Pick the smallest alpha that is as good as the best. `decide` then has it confirmed on the other half.

Each part is a generator: it yields the rung that it needs and, once that is evaluated, goes on. It looks at no more prompts than it
has asked for so far, even where more are stored. So it takes the same way each time, and a killed search is resumed by running it
again over what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import numpy as np

from expo_ray.config import Search, format_alpha
from expo_ray.evaluation.search.guardrails import objection, veto
from expo_ray.evaluation.search.history import Half, Picked, Rejected, Rung
from expo_ray.evaluation.statistics import Array, losers, standard_error

# The constants of this file were tuned on synthetic pairs with `benchmarks/alpha_search.py --first-seed 100000`; the regret and the
# price of a search with them, on other seeds, are in `benchmarks/results/alpha_search.md`.

# The paper's grid begins here, and its optima lie between 0.1 and 25 (arXiv 2404.16792). Equal steps in log alpha reach them all: ten
# steps that double end at the default `largest_alpha`, 51.2. The race also looks below the first step.
FIRST_ALPHA = 0.1
# The first steps are asked for at once: few optima lie below 0.4, and engines in parallel wait less.
FIRST_STEPS = 3
# Candidates of the race: the best step of the ladder times these powers of 2. Doubling leaves the optimum within a factor of 2.
_AROUND = (-1, -0.5, 0, 0.5, 1)
# Candidates kept after each round of the race when no test separates them; the last entry repeats. Each costs as many responses as
# the next round has prompts: with these, the dearest of 500 searches in the benchmark took 5,816 responses (wanted: at most 6,000).
_KEPT = (3, 2, 1)
# The fit takes alphas up to this factor from the best, where a quadratic describes the curve. Candidates lie up to a factor of 2
# away, and a little more, because steps are rounded.
_FITTED_WITHIN = 2.1
# The top of the fit replaces measured alphas within this factor. On a parabola through dpo, a factor of 1.2 from the top costs 4 % of
# the gain; the standard error of a mean difference on 1,000 prompts, 0.07 rewards in the benchmark, seldom shows that.
_SAME_WITHIN = 1.2


def ladder(half: Half, settings: Search) -> Generator[Rung, Rung, Picked]:
    """Search on the choosing half: yield the rungs, return the picked alpha."""
    course = _Course(half, settings)
    best_step = yield from course.climb()
    finalists = yield from course.race(course.candidates(best_step))
    finalists = yield from course.final(course.with_top(finalists))
    return course.pick(finalists)


class _Course:
    """State of one search: the alphas that it has asked for and rejected so far."""

    def __init__(self, half: Half, settings: Search) -> None:
        self.half, self.settings = half, settings
        self.sizes = sizes_of(half, settings)
        self.final_stage = f"final at {self.sizes[-1]} prompts"
        self.steps = climbing_steps(settings)
        # A step of the ladder or a round of the race may end an alpha: each spends the same share of the error.
        self.level = (1 - settings.confidence) / (len(self.steps) + len(self.sizes))
        self.ceiling = math.inf
        # The smallest alpha that a guardrail or another reward model ended since the last look below it.
        self.vetoed_at = math.inf
        self.asked: dict[float, int] = {}
        self.rejected: dict[float, Rejected] = {}
        self.warnings: list[str] = []

    def climb(self) -> Generator[Rung, Rung, float]:
        """Double alpha until a guardrail trips or the reward is significantly below the best; return the best step above 0."""
        size, passed = self.sizes[0], [0.0]
        for number, alpha in enumerate(self.steps):
            if number == 0:
                yield self._rung((0.0, *self.steps[:FIRST_STEPS]), size, "ladder")
            elif number >= FIRST_STEPS:
                yield self._rung((0.0, alpha), size, "ladder")
            if self._vetoed(alpha, size, "ladder"):
                self.ceiling = alpha
                break
            passed.append(alpha)
            if losers(self._rewards(passed, size), self.level)[-1]:
                self._reject_below(alpha, passed, size, "ladder")
                self.ceiling = alpha
                break
        else:
            self.warnings.append(
                f"the reward did not fall up to alpha {format_alpha(self.steps[-1])}, the last step of the ladder; raise `largest_alpha` "
                "to climb further"
            )
        self._leave_behind(size)
        means = self._rewards(passed, size).mean(axis=0)
        # Where the first step is already too far, the race looks below it.
        return passed[1 + int(means[1:].argmax())] if len(passed) > 1 else self.steps[0]

    def candidates(self, best: float) -> tuple[float, ...]:
        """Log-spaced alphas around the best step of the ladder, below what stopped the climb."""
        around = (rounded(best * 2**power, 3) for power in _AROUND)
        return tuple(
            alpha for alpha in around if alpha < self.ceiling and alpha <= self.settings.largest_alpha
        )

    def race(self, alive: tuple[float, ...]) -> Generator[Rung, Rung, tuple[float, ...]]:
        """Compare on more and more prompts, up to the last number but one; return the alphas that are left, without dpo."""
        for round_number, size in enumerate(self.sizes[:-1] or self.sizes):
            if alive:
                stage = f"race at {size} prompts"
                yield self._rung((0.0, *alive), size, stage)
                alive = self._survivors(alive, size, stage)
                alive = self._best_of(alive, size, _KEPT[min(round_number, len(_KEPT) - 1)], stage)
                alive = alive or self._below_veto()
        return alive

    def with_top(self, alive: tuple[float, ...]) -> tuple[float, ...]:
        """Add the maximum of the fitted curve to `alive`, in place of those that are as good as equal to it."""
        best = max(alive, key=self._gain, default=0.0)
        near = [
            alpha
            for alpha in self.asked
            if 0 < alpha < self.ceiling and best / _FITTED_WITHIN <= alpha <= best * _FITTED_WITHIN
        ]
        top = top_of(near, [self._gain(alpha) for alpha in near], [self.asked[alpha] for alpha in near])
        if top is None or top in alive:
            return alive
        same = [alpha for alpha in alive if max(alpha / top, top / alpha) < _SAME_WITHIN]
        for alpha in same:
            reason = f"alpha {format_alpha(top)}, the top of the fitted curve, takes its place"
            self._reject(alpha, self.final_stage, reason)
        return tuple(sorted({*alive, top} - set(same)))

    def final(self, alive: tuple[float, ...]) -> Generator[Rung, Rung, tuple[float, ...]]:
        """Compare on all prompts; return the alphas that every guardrail and every reward model lets pass.

        Where nothing is left, the best alpha below the rejected ones gets its turn.
        """
        size, stage = self.sizes[-1], self.final_stage
        survivors: tuple[float, ...] = ()
        while alive and not survivors:
            yield self._rung((0.0, *alive), size, stage)
            survivors = self._unopposed(self._survivors(alive, size, stage), size, stage)
            alive = survivors or self._below_veto()
        return survivors

    def pick(self, finalists: tuple[float, ...]) -> Picked:
        """Pick the smallest alpha that is as good as the best, and note why the others fell."""
        if not finalists:
            return self._picked(0.0)
        best, picked = smallest_within_one_error(self.half, finalists, self.sizes[-1])
        for alpha in finalists:
            self._reject(
                alpha,
                self.final_stage,
                f"alpha {format_alpha(picked)} is smaller and within one standard error of the best, {format_alpha(best)}"
                if alpha > picked
                else f"its reward is more than one standard error below alpha {format_alpha(best)}",
            )
        return self._picked(picked)

    def _below_veto(self) -> tuple[float, ...]:
        """The best of the alphas below one that was ended late, not by its reward, when no other was left beside it."""
        if self.vetoed_at == math.inf:
            return ()
        self.ceiling, self.vetoed_at = min(self.ceiling, self.vetoed_at), math.inf
        below = [
            alpha
            for alpha, size in self.asked.items()
            if 0 < alpha < self.ceiling and not objection(self.half, alpha, size)
        ]
        return (max(below, key=self._gain),) if below else ()

    def _gain(self, alpha: float) -> float:
        """Mean gain over dpo, on the prompts asked for so far."""
        rewards = self._rewards((0.0, alpha), self.asked[alpha])
        return float((rewards[:, 1] - rewards[:, 0]).mean())

    def _rewards(self, alphas: Sequence[float], size: int) -> Array:
        return self.half.rewards(tuple(alphas), size)

    def _rung(self, alphas: tuple[float, ...], size: int, stage: str) -> Rung:
        self.asked.update(dict.fromkeys(alphas, size))
        return Rung("choose", alphas, 0, size, stage)

    def _reject(self, alpha: float, stage: str, reason: str) -> None:
        self.rejected.pop(alpha, None)  # the last to fall stands last
        self.rejected[alpha] = Rejected(alpha, stage, reason)

    def _vetoed(self, alpha: float, size: int, stage: str) -> bool:
        # The interval is two-sided, the veto looks at its upper end alone.
        reason = veto(self.half, self.settings, alpha, size, confidence=1 - 2 * self.level)
        if reason:
            self._reject(alpha, stage, reason)
        return bool(reason)

    def _leave_behind(self, size: int) -> None:
        """Reject the steps that were asked for together with the one that ended the climb."""
        for alpha in [alpha for alpha in self.asked if alpha > self.ceiling]:
            self._reject(
                alpha, "ladder", f"the climb ended at alpha {format_alpha(self.ceiling)}, on {size} prompts"
            )

    def _survivors(self, alive: tuple[float, ...], size: int, stage: str) -> tuple[float, ...]:
        """Drop what a guardrail rejects, or another alpha, dpo among them, significantly exceeds; return the others."""
        passed = tuple(alpha for alpha in alive if not self._vetoed(alpha, size, stage))
        self.vetoed_at = math.inf if passed else min(alive)
        field = (0.0, *passed)
        lost = losers(self._rewards(field, size), self.level)
        for alpha, gone in zip(field, lost, strict=True):
            if gone and alpha:
                self._reject_below(alpha, field, size, stage)
        return tuple(alpha for alpha, gone in zip(field, lost, strict=True) if alpha and not gone)

    def _unopposed(self, alive: tuple[float, ...], size: int, stage: str) -> tuple[float, ...]:
        """Drop what another reward model can hardly confirm; return the others."""
        reasons = {alpha: objection(self.half, alpha, size) for alpha in alive}
        passed = tuple(alpha for alpha in alive if not reasons[alpha])
        for alpha in set(alive) - set(passed):
            self._reject(alpha, stage, reasons[alpha])
        if alive and not passed:
            self.vetoed_at = min(alive)
        return passed

    def _best_of(self, alive: tuple[float, ...], size: int, kept: int, stage: str) -> tuple[float, ...]:
        """Keep the alphas with the highest means, where no test separates them."""
        means = dict(zip(alive, self._rewards((0.0, *alive), size).mean(axis=0)[1:], strict=True))
        order = sorted(alive, key=lambda alpha: -means[alpha])
        for alpha in order[kept:]:
            self._reject(
                alpha,
                stage,
                f"its reward is {means[order[0]] - means[alpha]:.3f} below alpha {format_alpha(order[0])}",
            )
        return tuple(sorted(order[:kept]))

    def _reject_below(self, alpha: float, field: Sequence[float], size: int, stage: str) -> None:
        means = dict(zip(field, self._rewards(field, size).mean(axis=0), strict=True))
        best = max(field, key=lambda other: means[other])
        self._reject(
            alpha,
            stage,
            f"its reward is significantly below alpha {format_alpha(best)}, by {means[best] - means[alpha]:.3f} on {size} prompts",
        )

    def _picked(self, alpha: float) -> Picked:
        last = next(reversed(self.rejected.values()), None)
        fault = (
            f"no alpha above 0 was left, {format_alpha(last.alpha)} fell last ({last.stage}): {last.reason}"
            if last and not alpha
            else ""
        )
        for other in self.asked:
            # Steps that passed, and were too far from the best for the race.
            if other and other not in self.rejected:
                self._reject(
                    other, "ladder", f"too far below the best step in reward, on {self.asked[other]} prompts"
                )
        rejected = (self.rejected[key] for key in sorted(self.rejected) if key != alpha)
        return Picked(alpha, self.sizes[-1], tuple(rejected), tuple(self.warnings), fault)


def climbing_steps(settings: Search) -> tuple[float, ...]:
    """Alphas of the climb: doubling from the first one to the largest."""
    steps = max(1, math.floor(math.log2(settings.largest_alpha / FIRST_ALPHA) + 1e-9) + 1)
    return tuple(FIRST_ALPHA * 2**step for step in range(steps))


def sizes_of(half: Half, settings: Search) -> tuple[int, ...]:
    """Prompts of each round; never more than the half has."""
    return tuple(sorted({min(size, half.num_prompts) for size in settings.prompts}))


def smallest_within_one_error(half: Half, alphas: tuple[float, ...], num_prompts: int) -> tuple[float, float]:
    """The best of `alphas`, and the smallest one that is at most one standard error of their difference below it.

    The one-standard-error rule (Breiman et al. 1984, for the size of trees): among what the data cannot tell apart, the simplest. Here that
    is the alpha that departs least from dpo. Where the search was lucky with the best one, the smaller one is the safer guess, and its
    responses grow less (by x1.04 to x1.30 in the paper's pairs, by x2.26 at alpha 8).
    """
    rewards = half.rewards(alphas, num_prompts)
    means = rewards.mean(axis=0)
    best = int(means.argmax())
    within = [
        alpha
        for at, alpha in enumerate(alphas)
        if means[best] - means[at] <= standard_error(rewards[:, best], rewards[:, at])
    ]
    return alphas[best], min(within)


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
    # `polyfit` squares its weights; the variance of a mean falls with the number of prompts.
    curvature, slope, _ = np.polyfit(log_alpha - centre, np.asarray(gains), 2, w=np.sqrt(num_prompts))
    if curvature >= 0:
        return None
    at = min(max(centre - slope / (2 * curvature), log_alpha.min()), log_alpha.max())
    return rounded(math.exp(at), 2)


def rounded(alpha: float, digits: int) -> float:
    """`alpha` in a few digits, which name a folder well and are finer than any search can resolve."""
    return float(f"{alpha:.{digits}g}")

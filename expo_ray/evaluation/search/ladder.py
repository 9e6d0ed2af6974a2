"""The default search: climb until it falls, race around the best, fit the top, and take the smallest alpha that is as good.

Each step is a generator: it yields the rung that it needs and, once that is evaluated, goes on. It looks at no more prompts than it
has asked for so far, even where more are stored. So it takes the same way each time, and a killed search is resumed by running it
again over what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy as np

from expo_ray.config import Search, format_alpha
from expo_ray.evaluation.search.comparisons import losers
from expo_ray.evaluation.search.history import Half, Rung
from expo_ray.evaluation.search.picked import (
    Picked,
    Rejected,
    objection,
    sizes_of,
    smallest_within_one_error,
    veto,
)
from expo_ray.evaluation.search.top import rounded, top_of

# The numbers of this file were tuned in benchmarks/alpha_search.py, on other seeds than it reports.
FIRST_ALPHA = 0.1
# The first steps are asked for at once: few optima lie below, and engines in parallel wait less.
_FIRST_STEPS = 3
# Candidates of the race: the best step of the ladder times these powers of 2.
_AROUND = (-1, -0.5, 0, 0.5, 1)
# Where no test tells the candidates apart, so many of the best go on from each round; the last number stands for all later rounds.
_KEPT = (3, 2, 1)
# The fit takes alphas up to this factor from the best, and a little more, for steps are rounded.
_FITTED_WITHIN = 2.1
# A top so close to a measured alpha is not told apart from it by any number of prompts that one would pay for: it takes its place.
_SAME_WITHIN = 1.2


def ladder(half: Half, settings: Search) -> Generator[Rung, None, Picked]:
    """Search on the choosing half; yields the rungs, and gives the picked alpha."""
    course = _Course(half, settings)
    best = yield from course.climb()
    alive = yield from course.race(course.candidates(best))
    return (yield from course.finish(alive))


class _Course:
    """One search: what it has asked for and rejected so far."""

    def __init__(self, half: Half, settings: Search) -> None:
        self.half, self.settings = half, settings
        self.sizes = sizes_of(half, settings)
        steps = max(1, math.floor(math.log2(settings.largest_alpha / FIRST_ALPHA) + 1e-9) + 1)
        self.steps = tuple(FIRST_ALPHA * 2**step for step in range(steps))
        # A step of the ladder or a round of the race may end an alpha: each spends the same share of the error.
        self.level = (1 - settings.confidence) / (steps + len(self.sizes))
        self.ceiling = math.inf
        # The smallest alpha that a guardrail or another reward model ended since the last look below it.
        self.vetoed_at = math.inf
        self.asked: dict[float, int] = {}
        self.rejected: dict[float, Rejected] = {}
        self.warnings: list[str] = []

    def climb(self) -> Generator[Rung, None, float]:
        """Double alpha until a guardrail trips or the reward is significantly below the best; gives the best step above 0."""
        size, passed = self.sizes[0], [0.0]
        for number, alpha in enumerate(self.steps):
            if number == 0:
                yield self._rung((0.0, *self.steps[:_FIRST_STEPS]), size, "ladder")
            elif number >= _FIRST_STEPS:
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

    def race(self, alive: tuple[float, ...]) -> Generator[Rung, None, tuple[float, ...]]:
        """Compare on more and more prompts, up to the last number but one; gives what is left, dpo not among it."""
        for round_number, size in enumerate(self.sizes[:-1] or self.sizes):
            if alive:
                stage = f"race at {size} prompts"
                yield self._rung((0.0, *alive), size, stage)
                alive = self._survivors(alive, size, stage)
                alive = self._best_of(alive, size, _KEPT[min(round_number, len(_KEPT) - 1)], stage)
                alive = alive or self._below_veto()
        return alive

    def finish(self, alive: tuple[float, ...]) -> Generator[Rung, None, Picked]:
        """Add the top of the fitted curve, compare on all prompts, and take the smallest alpha that is as good as the best."""
        size = self.sizes[-1]
        stage = f"final at {size} prompts"
        alive = self._with_top(alive, stage)
        survivors: tuple[float, ...] = ()
        while alive and not survivors:
            yield self._rung((0.0, *alive), size, stage)
            survivors = self._unopposed(self._survivors(alive, size, stage), size, stage)
            alive = survivors or self._below_veto()
        if not alive:
            return self._picked(0.0, size)
        best, picked = smallest_within_one_error(self.half, alive, size)
        for alpha in alive:
            self._reject(
                alpha,
                stage,
                f"alpha {format_alpha(picked)} is smaller and within one standard error of the best, {format_alpha(best)}"
                if alpha > picked
                else f"its reward is more than one standard error below alpha {format_alpha(best)}",
            )
        return self._picked(picked, size)

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

    def _with_top(self, alive: tuple[float, ...], stage: str) -> tuple[float, ...]:
        """`alive` with the maximum of the fitted curve, in place of those that are as good as equal to it."""
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
            self._reject(
                alpha, stage, f"alpha {format_alpha(top)}, the top of the fitted curve, takes its place"
            )
        return tuple(sorted({*alive, top} - set(same)))

    def _gain(self, alpha: float) -> float:
        """Mean gain over dpo, on the prompts asked for so far."""
        rewards = self._rewards((0.0, alpha), self.asked[alpha])
        return float((rewards[:, 1] - rewards[:, 0]).mean())

    def _rewards(
        self, alphas: list[float] | tuple[float, ...], size: int
    ) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        return self.half.rewards(tuple(alphas), size)

    def _rung(self, alphas: tuple[float, ...], size: int, why: str) -> Rung:
        self.asked.update(dict.fromkeys(alphas, size))
        return Rung("choose", alphas, size, why)

    def _reject(self, alpha: float, stage: str, reason: str) -> None:
        self.rejected.pop(alpha, None)  # the last to fall stands last
        self.rejected[alpha] = Rejected(alpha, stage, reason)

    def _vetoed(self, alpha: float, size: int, stage: str) -> bool:
        reason = veto(self.half, self.settings, alpha, size, 1 - 2 * self.level)
        if reason:
            self._reject(alpha, stage, reason)
        return bool(reason)

    def _leave_behind(self, size: int) -> None:
        """Steps that were asked for together with the one that ended the climb."""
        for alpha in [alpha for alpha in self.asked if alpha > self.ceiling]:
            self._reject(
                alpha, "ladder", f"the climb ended at alpha {format_alpha(self.ceiling)}, on {size} prompts"
            )

    def _survivors(self, alive: tuple[float, ...], size: int, stage: str) -> tuple[float, ...]:
        """Those that no guardrail and no significantly better alpha, dpo among them, ends."""
        passed = tuple(alpha for alpha in alive if not self._vetoed(alpha, size, stage))
        self.vetoed_at = math.inf if passed else min(alive)
        field = (0.0, *passed)
        lost = losers(self._rewards(field, size), self.level)
        for alpha, gone in zip(field, lost, strict=True):
            if gone and alpha:
                self._reject_below(alpha, field, size, stage)
        return tuple(alpha for alpha, gone in zip(field, lost, strict=True) if alpha and not gone)

    def _unopposed(self, alive: tuple[float, ...], size: int, stage: str) -> tuple[float, ...]:
        """Those that the other reward models may confirm."""
        reasons = {alpha: objection(self.half, alpha, size) for alpha in alive}
        passed = tuple(alpha for alpha in alive if not reasons[alpha])
        for alpha in set(alive) - set(passed):
            self._reject(alpha, stage, reasons[alpha])
        if alive and not passed:
            self.vetoed_at = min(alive)
        return passed

    def _best_of(self, alive: tuple[float, ...], size: int, kept: int, stage: str) -> tuple[float, ...]:
        """The alphas with the highest means, where no test tells more."""
        means = dict(zip(alive, self._rewards((0.0, *alive), size).mean(axis=0)[1:], strict=True))
        order = sorted(alive, key=lambda alpha: -means[alpha])
        for alpha in order[kept:]:
            self._reject(
                alpha,
                stage,
                f"its reward is {means[order[0]] - means[alpha]:.3f} below alpha {format_alpha(order[0])}",
            )
        return tuple(sorted(order[:kept]))

    def _reject_below(
        self, alpha: float, field: list[float] | tuple[float, ...], size: int, stage: str
    ) -> None:
        means = dict(zip(field, self._rewards(field, size).mean(axis=0), strict=True))
        best = max(field, key=lambda one: means[one])
        self._reject(
            alpha,
            stage,
            f"its reward is significantly below alpha {format_alpha(best)}, by {means[best] - means[alpha]:.3f} on {size} prompts",
        )

    def _picked(self, alpha: float, size: int) -> Picked:
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
        return Picked(alpha, size, tuple(rejected), tuple(self.warnings), fault)

"""The search by a response surface: measure little, where the curve of the gain says that it tells most.

1. Climb: double alpha on few prompts until the reward falls or a guardrail trips.
2. Rounds: fit the gain as a function of alpha (`gain_curve`), and ask the next prompts at dpo, at the top of the curve and at both ends of
   where the top may lie, until the best measured alpha leaves little of the gain, or no gain is left that could be confirmed.
3. Pick the best of the measured alphas. `confirmation` then looks at it on the other half.

As `ladder`, it is a generator that yields the rung that it needs and looks at nothing else. What a rung asked is taken as it was asked, so that
a search is resumed where it was even where another machine's linear algebra would have rounded otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from expo_ray.config import Search, format_alpha
from expo_ray.evaluation.search.confirmation import smallest_confirmed
from expo_ray.evaluation.search.gain_curve import DRAWS, GainCurve, Slice, deviation, difference, fit
from expo_ray.evaluation.search.guardrails import veto
from expo_ray.evaluation.search.history import Half, Picked, Rejected, Rung
from expo_ray.evaluation.search.ladder import FIRST_STEPS, climbing_steps, rounded
from expo_ray.evaluation.statistics import Array

# The constants of this file were chosen on synthetic pairs with `benchmarks/alpha_search.py --first-seed 100000`, of the first family alone;
# `benchmarks/results/alpha_search.md` has what they give on other seeds, and on a family that nothing was tuned on.

# The climb ends at a step so many standard errors below the best one, or at the second in a row that is fewer below: a dip between two humps
# does not end it.
_PLAIN_FALL, _FALL_TWICE = 4.5, 2.5
# Steps below the first one, by halves, where the top may lie there.
_STEPS_BELOW = 2
# An alpha above the best that has lost half of the best one's gain, by so many standard errors, bounds the search.
_FALLEN = 3.0
# Rounds, the climb among them, that a search has at least, however few sizes the settings name: the first curve knows only steps that double.
_FEWEST_ROUNDS = 3
# The search ends once the best measured alpha is expected to leave less than this share of its gain to a better one, after two rounds and after
# more, as a further round then costs twice as much...
_SHORTFALLS = (0.01, 0.03)
# ... or once the chance that some alpha's gain could be confirmed is below this.
_HOPELESS = 0.05
# The flanks that a round asks: these quantiles of where the top may lie, at least this factor away from it. The first round looks wide, as the
# curve may have another hump; the others look near the top.
_FLANKS, _APART = (0.03, 0.1), 1.3
# The picked alpha goes to confirmation if its gain is above zero with this probability.
_LIKELY = 0.95
# Alphas at which the curve is looked at, beside the measured ones, and the smallest of them.
_GRID, _SMALLEST = 90, 0.006
_DIGITS = 2


def surface(half: Half, settings: Search) -> Generator[Rung, Rung, Picked]:
    """Search on the choosing half: yield the rungs, return the picked alpha."""
    course = _Course(half, settings)
    yield from course.climb()
    while (state := course.state()).asks_on:
        yield from course.ask(state)
    return course.pick(state)


@dataclass(frozen=True, eq=False)
class _State:
    """What the search knows between two rounds.

    Attributes:
        curve: of the gain, up to the ceiling.
        passes: (alphas, draws), true where every other reward model would let the alpha pass.
        measured: the alphas that may be picked, in rising order.
        best: the measured alpha with the highest expected gain, counted as far as the other models let it pass; 0 without any.
        reach: chance that the gain of some alpha is large enough to be confirmed.
        fault: reason to give up; empty if there is none.
        asks_on: true if another round is worth its price.
    """

    curve: GainCurve
    passes: NDArray[np.bool_]
    measured: tuple[float, ...]
    best: float
    reach: float
    fault: str
    asks_on: bool

    @property
    def worth(self) -> Array:
        """Expected gains times the chance that the other models let them pass: (alphas,)."""
        return np.asarray(self.curve.mean * self.passes.mean(axis=1), np.float64)

    @property
    def hopes(self) -> Array:
        """Drawn gains where the other models let them pass: (alphas, draws)."""
        return np.asarray(np.where(self.passes, self.curve.draws, -np.inf), np.float64)


class _Course:
    """State of one search: what it has asked for and rejected so far."""

    def __init__(self, half: Half, settings: Search) -> None:
        self.half, self.settings = half, settings
        self.ends = round_ends(half.num_prompts, settings)
        self.steps = climbing_steps(settings)
        # A step of the climb or a round may end an alpha by a test: each spends the same share of the error.
        level = (1 - settings.confidence) / (len(self.steps) + len(self.ends))
        self.veto_confidence = 1 - 2 * level
        self.asked: list[Rung] = []
        self.rounds = 1
        self.ceiling = math.inf
        self.rejected: dict[float, Rejected] = {}
        self.warnings: list[str] = []

    @property
    def seen(self) -> int:
        """Prompts asked so far."""
        return max(rung.stop for rung in self.asked)

    def climb(self) -> Generator[Rung, Rung, None]:
        """Double alpha on the first prompts until the reward plainly falls or a guardrail trips."""
        passed, before = [0.0], 0.0
        for number, alpha in enumerate(self.steps):
            if number == 0:
                yield from self._ask((0.0, *self.steps[:FIRST_STEPS]), 0, self.ends[0], "climb")
            elif number >= FIRST_STEPS:
                yield from self._ask((0.0, alpha), 0, self.ends[0], "climb")
            fall, best = self._fall(passed, alpha)
            plain = fall > _PLAIN_FALL or min(fall, before) > _FALL_TWICE
            if self._vetoed(alpha, "climb") or plain:
                self._close(alpha, best, "climb")
                break
            passed.append(alpha)
            before = fall
        else:
            self.warnings.append(
                f"the reward did not fall up to alpha {format_alpha(self.steps[-1])}, the last step of the climb; raise `largest_alpha` "
                "to climb further"
            )
        if best <= self.steps[0] or self.ceiling <= self.steps[min(1, len(self.steps) - 1)]:
            below = tuple(self.steps[0] / 2**step for step in range(1, _STEPS_BELOW + 1))
            yield from self._ask((0.0, *below), 0, self.ends[0], "below the first step")

    def state(self) -> _State:
        """Fit what was asked so far, and say whether to ask on."""
        slices = self._slices()
        self._lower_ceiling(slices)
        measured = tuple(alpha for alpha in self._tried() if alpha < self.ceiling)
        curve = fit(slices, self._grid(measured))
        state = _State(curve, self._passes(curve.alphas), measured, 0.0, 0.0, "", asks_on=False)
        at = max((curve.at(alpha) for alpha in measured), key=lambda at: state.worth[at], default=-1)
        best, highest = (float(curve.alphas[at]) if measured else 0.0), np.maximum(state.hopes.max(axis=0), 0)
        gained = curve.draws[at] if measured else np.zeros(highest.shape)
        confirmed = np.where(state.passes[at], gained, 0) if measured else gained
        needed = smallest_confirmed(math.sqrt(2) * deviation(slices), self._confirming_prompts())
        reach = float((highest > needed).mean())
        shortfall = float((highest - confirmed).mean())
        fault = self._fault(reach, needed, best, float((gained > 0).mean()))
        if fault:
            most = float(np.quantile(highest, 0.95))
            fault += f"; with a probability of 95 %, no alpha gains more than {most:+.3f}"
        gain = float(state.worth[at]) if measured else 0.0
        tolerated = _SHORTFALLS[min(self.rounds - 2, len(_SHORTFALLS) - 1)] if self.rounds > 1 else 0.0
        is_close = gain > 0 and shortfall <= tolerated * gain
        asks_on = reach >= _HOPELESS and not is_close and self.rounds < len(self.ends)
        return replace(state, best=best, reach=reach, fault=fault, asks_on=asks_on)

    def _passes(self, alphas: Array) -> NDArray[np.bool_]:
        """Draw whether every other reward model would let an alpha pass at the confirmation, in half of all cases: (alphas, draws)."""
        passes = np.ones((len(alphas), DRAWS), bool)
        for number, (model, criterion) in enumerate(self.half.others(), 1):
            slices = self._slices(model)
            paired = math.sqrt(2) * deviation(slices)
            margin = criterion.margin if criterion.allows_loss else 0.0
            needed = smallest_confirmed(paired, self._confirming_prompts()) - margin * paired
            passes &= fit(slices, alphas.tolist(), seed=number).draws > needed
        return passes

    def ask(self, state: _State) -> Generator[Rung, Rung, None]:
        """Ask the next prompts at dpo, at the top of the curve and at both ends of where the top may lie."""
        curve, hopes = state.curve, state.hopes
        start, stop = self._next_slice()
        top = float(curve.alphas[state.worth.argmax()])
        hopeful = hopes[:, hopes.max(axis=0) > 0]
        tops = curve.alphas[hopeful.argmax(axis=0)] if hopeful.size else np.array([top])
        flank = _FLANKS[min(self.rounds, len(_FLANKS)) - 1]
        low, high = np.quantile(tops, [flank, 1 - flank], method="nearest")
        flanks = max(min(low, top / _APART), curve.alphas[0]), min(max(high, top * _APART), curve.alphas[-1])
        alphas = sorted({0.0, *(rounded(float(alpha), _DIGITS) for alpha in (flanks[0], top, flanks[1]))})
        self.rounds += 1
        yield from self._ask(tuple(alphas), start, stop, f"round {self.rounds}")
        for alpha in self._tried():
            if alpha < self.ceiling and self._vetoed(alpha, f"round {self.rounds}"):
                self.ceiling = alpha

    def pick(self, state: _State) -> Picked:
        """Pick the best measured alpha, and note why the others fell."""
        picked = 0.0 if state.fault else state.best
        for alpha in self._tried():
            if alpha != picked and alpha not in self.rejected:
                self._reject(alpha, "curve", self._below(alpha, state, picked))
        rejected = tuple(self.rejected[alpha] for alpha in sorted(self.rejected))
        fitted = state.curve.fitted(self.settings.confidence)
        return Picked(picked, self.seen, rejected, tuple(self.warnings), state.fault, fitted)

    def _ask(
        self, alphas: tuple[float, ...], start: int, stop: int, stage: str
    ) -> Generator[Rung, Rung, None]:
        asked = yield Rung("choose", alphas, start, stop, stage)
        self.asked.append(asked)

    def _next_slice(self) -> tuple[int, int]:
        """The next prompts; all of them again, at other alphas, where too few new ones are left for a round."""
        seen, stop = self.seen, self.ends[self.rounds]
        return (seen, stop) if stop - seen >= min(self.ends[0], stop // 2) else (0, max(seen, stop))

    def _slices(self, model: str = "") -> list[Slice]:
        """Rewards by a model, by default the choosing one, as slices in which every prompt saw the same alphas."""
        cuts = sorted({0, *(rung.start for rung in self.asked), *(rung.stop for rung in self.asked)})
        slices = []
        for start, stop in itertools.pairwise(cuts):
            covering = [rung for rung in self.asked if rung.start <= start and stop <= rung.stop]
            alphas = tuple(sorted({alpha for rung in covering for alpha in rung.alphas}))
            slices.append(Slice.of(alphas, self.half.rewards(alphas, stop, start, model=model)))
        return slices

    def _tried(self) -> list[float]:
        """All alphas above 0 that were asked, in rising order."""
        return sorted({alpha for rung in self.asked for alpha in rung.alphas if alpha > 0})

    def _fall(self, passed: Sequence[float], alpha: float) -> tuple[float, float]:
        """How many standard errors a step lies below the best one so far, and that one."""
        rewards = self.half.rewards((*passed, alpha), self.ends[0])
        best = int(rewards[:, :-1].mean(axis=0).argmax())
        lost = rewards[:, best] - rewards[:, -1]
        error = float(lost.std(ddof=1)) / math.sqrt(len(lost))
        return float(lost.mean()) / max(error, 1e-12), passed[best]

    def _lower_ceiling(self, slices: Sequence[Slice]) -> None:
        """Bound the search by the smallest alpha that has plainly lost half of the best one's gain."""
        measured = [alpha for alpha in self._tried() if alpha < self.ceiling]
        gains = {alpha: difference(slices, alpha, 0.0) for alpha in measured}
        # Half a standard error less: an alpha that few prompts saw is not the best by luck.
        best = max(measured, key=lambda alpha: gains[alpha][0] - 0.5 * gains[alpha][1], default=0.0)
        for alpha in measured:
            lost, error = difference(slices, best, alpha)
            if alpha > best and lost - max(gains[best][0], 0.0) / 2 > _FALLEN * error:
                self._close(alpha, best, "curve")
                return

    def _close(self, alpha: float, best: float, stage: str) -> None:
        """Look no further up than `alpha`, which is plainly below `best`, or which a guardrail rejects."""
        self.ceiling = alpha
        lost, _ = difference(self._slices(), best, alpha)
        self.rejected.setdefault(
            alpha,
            Rejected(alpha, stage, f"its reward is plainly below alpha {format_alpha(best)}, by {lost:.3f}"),
        )
        for beyond in self._tried():
            if beyond > alpha and beyond not in self.rejected:
                self._reject(beyond, stage, f"the search ends at alpha {format_alpha(alpha)}")

    def _grid(self, measured: Sequence[float]) -> list[float]:
        """Alphas at which the curve is looked at: the measured ones, and log-spaced ones up to the ceiling."""
        tried = self._tried()
        top = min(self.ceiling / 1.02, tried[-1])
        bottom = max(min(tried[0] / 2, top / 2), _SMALLEST)
        between = np.geomspace(bottom, max(top, bottom), _GRID)
        return sorted({*measured, *(rounded(float(alpha), 3) for alpha in between)})

    def _confirming_prompts(self) -> int:
        return self.settings.confirm_prompts

    def _fault(self, reach: float, needed: float, best: float, likely: float) -> str:
        """Reason to keep dpo; empty if there is none."""
        if reach < _HOPELESS:
            return (
                f"a gain as large as {needed:+.3f}, which {self._confirming_prompts()} untouched prompts would confirm in half of all cases, "
                f"has become unlikely at any alpha ({reach:.1%}, on {self.seen} prompts)"
            )
        if best and likely < _LIKELY:
            return f"the gain of alpha {format_alpha(best)}, the best one, is above zero with a probability of {likely:.0%} only"
        return "" if best else "no alpha above 0 was left"

    def _below(self, alpha: float, state: _State, picked: float) -> str:
        at = state.curve.at(alpha)
        other = f", below {format_alpha(picked)}" if picked else ""
        chance = float(state.passes[at].mean())
        let = (
            ""
            if chance == 1
            else f"; the other reward models would let it pass with a probability of {chance:.0%}"
        )
        return f"the curve through all measurements puts its gain at {state.curve.mean[at]:+.3f}{other}{let}"

    def _reject(self, alpha: float, stage: str, reason: str) -> None:
        self.rejected[alpha] = Rejected(alpha, stage, reason)

    def _vetoed(self, alpha: float, stage: str) -> bool:
        reason = veto(self.half, self.settings, alpha, self.seen, self.veto_confidence)
        if reason:
            self._reject(alpha, stage, reason)
        return bool(reason)


def round_ends(num_prompts: int, settings: Search) -> tuple[int, ...]:
    """Prompts seen after each round, the climb's first; the last number repeats where the settings name too few rounds."""
    sizes = [min(size, num_prompts) for size in settings.prompts]
    return tuple(sizes + sizes[-1:] * (_FEWEST_ROUNDS - len(sizes)))

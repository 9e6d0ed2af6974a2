"""After alpha is chosen: whether a group of tensors is better off with more of it, or with less.

Each group alone is tried with a few multipliers on few prompts; the best of every group that looks better, and all of them
together, on many; and the best of those is confirmed on the other half, against alpha alone and against dpo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from expo_ray.config import Group, Search, format_alpha
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.guardrails import checks, rejection
from expo_ray.evaluation.search.history import HalfName
from expo_ray.evaluation.search.methods import FEWEST_PROMPTS
from expo_ray.evaluation.search.search_pair import Evaluate, Tell, first, halves_of
from expo_ray.evaluation.statistics import gain, standard_error
from expo_ray.extrapolation.step import DPO, Step
from expo_ray.report.results import Interval

# Of alpha, in one group. 1 is alpha alone.
FACTORS = (0.0, 0.5, 2.0)

Found = Mapping[Step, AlphaScores]


@dataclass(frozen=True)
class Trial:
    """One step with multipliers on the choosing half.

    Attributes:
        gain: over alpha alone, by the reward model that chooses.
        fell: why it went no further; empty if it did.
    """

    step: Step
    num_prompts: int
    gain: Interval
    fell: str


@dataclass(frozen=True)
class GroupDecision:
    """What came of searching multipliers.

    Attributes:
        step: the chosen one; without multipliers where none is better than alpha alone.
        reason: in a sentence, with the values that decided.
        trials: all that was tried, each on the most prompts.
        found: the last finalist, alpha alone and dpo, by half; empty where nothing got so far.
    """

    step: Step
    reason: str
    trials: tuple[Trial, ...]
    found: Mapping[HalfName, Found]


def search_groups(
    alpha: float, prompts: PromptSet, settings: Search, evaluate: Evaluate, tell: Tell, *, at_once: int
) -> GroupDecision:
    """Try multipliers on a chosen alpha.

    Args:
        alpha: chosen, above 0.
        evaluate: safe to call from several threads; what is stored is not made again, so that a rerun goes the same way.
        tell: is told each round, and the decision.
        at_once: steps to evaluate at the same time.

    Raises:
        ExpoError: if a step cannot be evaluated.
    """
    with ThreadPoolExecutor(at_once, "group") as pool:
        decision = _Course(Step(alpha), halves_of(prompts), settings, evaluate, tell, pool).decide()
    tell(decision.reason)
    return decision


@dataclass
class _Course:
    """One search; `trials` holds what it has tried so far."""

    alone: Step
    halves: Mapping[HalfName, PromptSet]
    settings: Search
    evaluate: Evaluate
    tell: Tell
    pool: ThreadPoolExecutor
    trials: dict[Step, Trial] = field(default_factory=dict)

    def decide(self) -> GroupDecision:
        groups = self.settings.groups
        single = {group: [self._step({group: factor}) for factor in FACTORS] for group in groups}
        found = self._ask(
            [one for steps in single.values() for one in steps], "choose", self.settings.prompts[0], "groups"
        )
        better = {
            group: best for group, steps in single.items() if (best := self._best(steps, found, errors=1))
        }
        if not better:
            return self._keep("no group is better with another multiplier, by more than one standard error")
        together = self._step({group: factor for best in better.values() for group, factor in best.factors})
        finalists = list(dict.fromkeys([*better.values(), together]))
        found = self._ask(finalists, "choose", self.settings.prompts[-1], "groups, final")
        best = self._best(finalists, found, errors=0)
        if best is None:
            return self._keep("on more prompts, no multiplier is better than alpha alone")
        return self._confirmed(best, {"choose": found})

    def _confirmed(self, best: Step, found: Mapping[HalfName, Found]) -> GroupDecision:
        """The decision on the last finalist: its gains over alpha alone and over dpo must be above zero on untouched prompts."""
        half: HalfName = "choose"
        confidence = self.settings.confidence
        if len(self.halves["confirm"]) >= FEWEST_PROMPTS:
            half = "confirm"
            found = {
                **found,
                half: self._ask([best], half, self.settings.confirm_prompts, "groups, confirmation"),
            }
        else:  # chosen on the very prompts that have to show it, from among all that was tried (Bonferroni)
            confidence = 1 - (1 - confidence) / len(self.trials)
        seen = found[half]
        chooser = next(iter(seen[DPO].rewards))
        bounds = {
            f"over alpha alone by {chooser}": self._gain(best, self.alone, chooser, seen, confidence)
        } | {
            f"over dpo by {model}": self._gain(best, DPO, model, seen, confidence)
            for model in seen[DPO].rewards
        }
        where = f"{len(seen[DPO].prompt_ids)} {'untouched prompts' if half == 'confirm' else 'prompts it was chosen on'}"
        text = f"{self._text(best)}: its gain on {where} is " + " and ".join(
            f"{one} {name}" for name, one in bounds.items()
        )
        fault = self._veto(best, seen, confidence)
        if any(one.low <= 0 for one in bounds.values()):
            fault = "; ".join(filter(None, [fault, "a lower bound is not above zero"]))
        if fault:
            self.trials[best] = replace(self.trials[best], fell=fault)
            return replace(self._keep(f"{text}; {fault}"), found=found)
        return GroupDecision(best, text, tuple(self.trials.values()), found)

    def _ask(self, steps: Sequence[Step], half: HalfName, size: int, why: str) -> Found:
        """Evaluate `steps`, and what they are compared with; on the choosing half, note what came of each."""
        asked = first(self.halves[half], size)
        self.tell(f"{why}, {'; '.join(map(str, steps))} on {len(asked)} prompts")
        every = [DPO, self.alone, *steps]
        found = dict(zip(every, self.pool.map(lambda step: self.evaluate(step, asked), every), strict=True))
        if half == "choose":
            model = next(iter(found[DPO].rewards))
            for step in steps:
                over_alone = self._gain(step, self.alone, model, found, self.settings.confidence)
                self.trials[step] = Trial(step, len(asked), over_alone, "")
        return found

    def _best(self, steps: Sequence[Step], found: Found, *, errors: float) -> Step | None:
        """The step with the largest gain over alpha alone, if that is above so many standard errors; the others fall."""
        model = next(iter(found[DPO].rewards))
        limits = {
            step: errors * standard_error(found[step].rewards[model], found[self.alone].rewards[model])
            for step in steps
        }
        for step in steps:
            fault = self._veto(step, found, self.settings.confidence)
            if not fault and self.trials[step].gain.mean <= limits[step]:
                fault = f"its gain over alpha alone is not above {limits[step]:.3f}"
            self.trials[step] = replace(self.trials[step], fell=fault)
        passed = [step for step in steps if not self.trials[step].fell]
        best = max(passed, key=lambda step: self.trials[step].gain.mean, default=None)
        for step in passed:
            if step != best:
                self.trials[step] = replace(self.trials[step], fell=f"{self._text(best)} is better")
        return best

    def _veto(self, step: Step, found: Found, confidence: float) -> str:
        return rejection(checks(found[step], found[DPO], self.settings.guardrails, confidence))

    def _gain(self, step: Step, reference: Step, model: str, found: Found, confidence: float) -> Interval:
        return gain(found[step].rewards[model], found[reference].rewards[model], confidence)

    def _keep(self, why: str) -> GroupDecision:
        reason = f"alpha {format_alpha(self.alone.alpha)} in all groups: {why}"
        return GroupDecision(self.alone, reason, tuple(self.trials.values()), {})

    def _step(self, factors: Mapping[Group, float]) -> Step:
        return Step.of(self.alone.alpha, factors)

    @staticmethod
    def _text(step: Step | None) -> str:
        return ", ".join(f"{group} x{format_alpha(factor)}" for group, factor in step.factors) if step else ""

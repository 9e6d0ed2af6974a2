"""Multipliers of a chosen alpha: is a group of tensors better off with more of it, or with less?

1. Each group alone is tried with a few multipliers, on few prompts.
2. The best multiplier of every group that looks better, and all of them together, are compared on many prompts.
3. The best of those is confirmed on the other half, against alpha alone and against dpo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from expo_ray.config import Group, Search, format_alpha
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.search.alpha_scores import AlphaScores, Evaluator, measurements
from expo_ray.evaluation.search.guardrails import checks, rejection
from expo_ray.evaluation.search.methods import FEWEST_PROMPTS
from expo_ray.evaluation.search.roles import DEFAULT_ROLES, Roles, role_tests
from expo_ray.evaluation.statistics import gain, standard_error
from expo_ray.extrapolation.step import DPO, Step
from expo_ray.report.results import Groups, GroupTrial, HalfName, Interval

# Of alpha, in one group: leave the group as in dpo, go half as far, or twice as far. 1 is alpha alone.
FACTORS = (0.0, 0.5, 2.0)

StepScores = Mapping[Step, AlphaScores]
NO_CLUSTERS: Mapping[str, int] = {}


def search_groups(
    alpha: float,
    halves: Mapping[HalfName, PromptSet],
    settings: Search,
    evaluator: Evaluator,
    announce: Callable[[str], None],
    *,
    at_once: int,
    roles: Roles = DEFAULT_ROLES,
    clusters: Mapping[str, int] = NO_CLUSTERS,
) -> tuple[Groups, StepScores]:
    """Try multipliers on a chosen alpha.

    Args:
        alpha: chosen, above 0.
        halves: of the prompt set, each in the order in which it is asked.
        evaluator: does not make again what is stored, so that a rerun goes the same way.
        announce: takes a line for each round, and the reason of the decision.
        at_once: steps to evaluate at the same time.
        roles: of the evaluator's reward models.
        clusters: of the prompts, by id.

    Returns:
        The multipliers that were chosen, or none, and the scores on the choosing half of those, alpha alone and dpo; no scores where
        alpha alone is kept.

    Raises:
        ExpoError: if a step cannot be evaluated.
    """
    with ThreadPoolExecutor(at_once, "group") as pool:
        course = _Course(Step(alpha), halves, settings, evaluator, announce, pool, roles, clusters)
        groups, scores = course.decide()
    announce(groups.reason)
    return groups, scores


@dataclass
class _Course:
    """State of one search; `trials` holds every step that it has tried, on the most prompts."""

    alone: Step
    halves: Mapping[HalfName, PromptSet]
    settings: Search
    evaluator: Evaluator
    announce: Callable[[str], None]
    pool: ThreadPoolExecutor
    roles: Roles
    clusters: Mapping[str, int]
    trials: dict[Step, GroupTrial] = field(default_factory=dict)

    def decide(self) -> tuple[Groups, StepScores]:
        """Search on the choosing half and confirm on the other."""
        by_group = {
            group: [self._step({group: factor}) for factor in FACTORS] for group in self.settings.groups
        }
        steps = [step for group_steps in by_group.values() for step in group_steps]
        scores = self._try(steps, self.settings.prompts[0], "groups")
        better = [
            best for group_steps in by_group.values() if (best := self._best(group_steps, scores, errors=1))
        ]
        if not better:
            return self._keep(
                "no group is better with another multiplier, by more than one standard error"
            ), {}
        together = self._step({group: factor for best in better for group, factor in best.factors})
        finalists = list(dict.fromkeys([*better, together]))
        scores = self._try(finalists, self.settings.prompts[-1], "groups, final")
        best = self._best(finalists, scores, errors=0)
        if best is None:
            return self._keep("on more prompts, no multiplier is better than alpha alone"), {}
        return self._confirm(best, scores)

    def _confirm(self, best: Step, chosen_on: StepScores) -> tuple[Groups, StepScores]:
        """Require that the gains of the last finalist over alpha alone and over dpo are above zero on untouched prompts."""
        scores, where, confidence = chosen_on, "prompts it was chosen on", self.settings.confidence
        by_half: dict[HalfName, StepScores] = {"choose": chosen_on}
        if len(self.halves["confirm"]) >= FEWEST_PROMPTS:
            scores = self._evaluate(
                [best], self.halves["confirm"].first(self.settings.confirm_prompts), "groups, confirmation"
            )
            by_half["confirm"], where = scores, "untouched prompts"
        else:  # chosen on the very prompts that have to show it, from among all that was tried (Bonferroni)
            confidence = 1 - (1 - confidence) / len(self.trials)
        over_alone = _gain(scores, best, self.alone, scores[DPO].chooser, confidence)
        tests = role_tests("confirm", scores[best], scores[DPO], self.roles, confidence)
        gains = " and ".join(
            [f"{over_alone} over alpha alone by {scores[DPO].chooser}"]
            + [f"{test.gain} over dpo by {test.reward_model}" for test in tests]
        )
        text = f"{_text(best)}: its gain on {len(scores[DPO].prompt_ids)} {where} is {gains}"
        failed = [test.reward_model for test in tests if not test.passed]
        faults = [
            self._veto(best, scores, confidence),
            "" if over_alone.low > 0 else "the lower bound over alpha alone is not above zero",
            f"the lower bound over dpo is too low for {' and '.join(failed)}" if failed else "",
        ]
        fault = "; ".join(filter(None, faults))
        if fault:
            self._note(best, fault)
            return self._keep(f"{text}; {fault}"), {}
        measured = tuple(
            measurement
            for half, of_half in by_half.items()
            for measurement in measurements(half, of_half[best], of_half[DPO], self.settings.confidence)
        )
        return Groups(dict(best.factors), text, tuple(self.trials.values()), measured), chosen_on

    def _try(self, steps: Sequence[Step], num_prompts: int, stage: str) -> StepScores:
        """Evaluate `steps` on the first prompts of the choosing half, and note the gain of each."""
        scores = self._evaluate(steps, self.halves["choose"].first(num_prompts), stage)
        for step in steps:
            over_alone = _gain(scores, step, self.alone, scores[DPO].chooser, self.settings.confidence)
            self.trials[step] = GroupTrial(dict(step.factors), len(scores[DPO].prompt_ids), over_alone, "")
        return scores

    def _evaluate(self, steps: Sequence[Step], prompts: PromptSet, stage: str) -> StepScores:
        """Evaluate `steps`, and what they are compared with."""
        self.announce(f"{stage}, {'; '.join(map(str, steps))} on {len(prompts)} prompts")
        compared = [DPO, self.alone, *steps]
        self.evaluator.expect(compared)
        evaluated = self.pool.map(lambda step: self.evaluator.evaluate(step, prompts), compared)
        scores = dict(zip(compared, evaluated, strict=True))
        scales = self.roles.scales(scores[DPO], scores[DPO].prompt_ids)
        return {
            step: self.roles.with_objective(of_step, scales).clustered(self.clusters)
            for step, of_step in scores.items()
        }

    def _best(self, steps: Sequence[Step], scores: StepScores, *, errors: float) -> Step | None:
        """The step with the largest gain over alpha alone, if that exceeds `errors` standard errors; notes why the others fell."""
        chooser = scores[DPO].chooser
        for step in steps:
            error = standard_error(
                scores[step].rewards[chooser],
                scores[self.alone].rewards[chooser],
                clusters=scores[step].clusters,
            )
            fault = self._veto(step, scores, self.settings.confidence)
            if not fault and self.trials[step].gain.mean <= errors * error:
                fault = f"its gain over alpha alone is not above {errors * error:.3f}"
            self._note(step, fault)
        passed = [step for step in steps if not self.trials[step].reason]
        best = max(passed, key=lambda step: self.trials[step].gain.mean, default=None)
        for step in passed:
            if best is not None and step != best:
                self._note(step, f"{_text(best)} is better")
        return best

    def _note(self, step: Step, reason: str) -> None:
        """Record why a step goes no further; an empty reason if it does."""
        self.trials[step] = replace(self.trials[step], reason=reason)

    def _veto(self, step: Step, scores: StepScores, confidence: float) -> str:
        return rejection(checks(scores[step], scores[DPO], self.settings.guardrails, confidence, self.roles))

    def _keep(self, why: str) -> Groups:
        """The result without multipliers."""
        reason = f"alpha {format_alpha(self.alone.alpha)} in all groups: {why}"
        return Groups({}, reason, tuple(self.trials.values()))

    def _step(self, factors: Mapping[Group, float]) -> Step:
        return Step.of(self.alone.alpha, factors)


def _gain(scores: StepScores, step: Step, reference: Step, model: str, confidence: float) -> Interval:
    rewards, of_reference = scores[step].rewards[model], scores[reference].rewards[model]
    return gain(rewards, of_reference, confidence, clusters=scores[step].clusters)


def _text(step: Step) -> str:
    return ", ".join(f"{group} x{format_alpha(factor)}" for group, factor in step.factors)

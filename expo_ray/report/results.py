"""Results of a run: the content of `results.json`, made by the search and drawn by the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict

from expo_ray.config.fields import Role, check_alpha

FORMAT = 1
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

HalfName = Literal["choose", "confirm"]
Verdict = Literal["ok", "warn", "reject"]
# JSON has no infinity: such a number is written as text.
Number = Annotated[
    float, BeforeValidator(lambda value: _NOT_FINITE.get(value, value) if isinstance(value, str) else value)
]
# Keys of JSON are text.
AlphaKey = Annotated[float, BeforeValidator(float), AfterValidator(check_alpha)]


# Marks fields that were added to the format: at their default they are left out, so that older files stay as they are.
ADDED = {"added": True}


class Recorded:
    """Base of what is stored: a field that this version does not know is an error, never passed over."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Interval(Recorded):
    """An estimate from means over prompts, with the ends of its two-sided confidence interval."""

    mean: Number
    low: Number
    high: Number

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Measurement(Recorded):
    """Measurement of an alpha on a half of the prompts, by a reward model.

    Attributes:
        half: `choose` or `confirm`.
        reward: mean raw reward.
        gain: paired difference to dpo on the same prompts and seeds.
        controlled_gain: the same with the effect of length removed; None where the two cannot be separated.
        win_rate: share of prompts on which it beats dpo, ties as half.
    """

    alpha: Number
    half: HalfName
    reward_model: str
    prompts: int
    reward: Interval
    gain: Interval
    controlled_gain: Interval | None
    win_rate: Number


@dataclass(frozen=True)
class RoleTest(Recorded):
    """Test of the alpha that a search picked, by a reward model in its role.

    Attributes:
        role: `choose` and `confirm` ask for a gain, `guard` and `joint` for no loss beyond a margin.
        half: whose prompts decided.
        gain: paired difference to dpo, with the interval that decided.
        limit: the value that its lower end must exceed: 0, or the margin below it.
        margin: in standard deviations of a paired difference; None where a gain is asked for.
        p_value: one-sided, of a gain no larger than `limit`.
    """

    reward_model: str
    role: Role
    half: HalfName
    prompts: int
    gain: Interval
    limit: Number
    margin: Number | None
    passed: bool
    p_value: Number = 1.0


@dataclass(frozen=True)
class LooksTaken(Recorded):
    """Confirmation of an alpha on untouched prompts: how many looks it took, and where it ended.

    Attributes:
        alpha: compared with dpo.
        looks: taken.
        prompts: asked at the last of them.
        most: prompts that it would have asked at most.
        ended: `passed`; `futile`, as not even an optimistic gain could have passed later; `last`, the prompts being used up.
    """

    alpha: Number
    looks: int
    prompts: int
    most: int
    ended: Literal["passed", "futile", "last"]


@dataclass(frozen=True)
class OtherLooks(Recorded):
    """Looks at the untouched prompts by other searches of the same pair, with other settings or of before.

    Attributes:
        searches: that looked.
        looks: of all of them.
    """

    searches: int
    looks: int


@dataclass(frozen=True)
class AskedAgain(Recorded):
    """dpo asked again at the end of a search, with the same seeds, on prompts that it had answered (an A/A comparison).

    Attributes:
        prompts: asked again.
        responses: to them.
        same: responses with the same text as before.
        changes: by reward model, the mean change of the reward on the same prompt.
        confidence: of the intervals of the changes.
    """

    prompts: int
    responses: int
    same: int
    changes: Mapping[str, Interval]
    confidence: Number

    @property
    def drifted(self) -> Mapping[str, Interval]:
        """The changes that chance does not explain."""
        return {model: change for model, change in self.changes.items() if change.low > 0 or change.high < 0}


@dataclass(frozen=True)
class FittedGain(Recorded):
    """Gain over dpo at an alpha by the curve through all that was measured, by what alpha is chosen by."""

    alpha: Number
    gain: Interval


@dataclass(frozen=True)
class GuardrailCheck(Recorded):
    """Result of a guardrail at an alpha.

    Attributes:
        name: as in `expo_ray.config.guardrails`, such as `length ratio`, or `reward of <model>`.
        value: what was measured.
        limit: the value from which on it rejects.
        verdict: `ok`, `warn` or `reject`, which keeps the alpha from being chosen.
        text: the values in a sentence.
        warn: the value from which on it warns; None where there is no such limit.
    """

    alpha: Number
    name: str
    value: Number
    limit: Number
    verdict: Verdict
    text: str
    warn: Number | None = None


@dataclass(frozen=True)
class Example(Recorded):
    """A prompt with the answers of sft, dpo and the chosen alpha.

    Attributes:
        prompt: the last user turn.
        responses: text by model: `sft`, `dpo`, and `chosen`, or `candidate` where dpo is kept; a model without an answer is left out.
        rewards: of the first reward model, likewise.
    """

    prompt: str
    responses: Mapping[str, str]
    rewards: Mapping[str, Number]


@dataclass(frozen=True)
class GroupTrial(Recorded):
    """Multipliers of the chosen alpha, tried on the choosing prompts; only in files of older versions.

    Attributes:
        multipliers: of alpha, by group of tensors.
        gain: paired difference to the chosen alpha alone, by the reward model that chooses.
        reason: for not choosing them; empty if they were chosen.
    """

    multipliers: Mapping[str, Number]
    prompts: int
    gain: Interval
    reason: str


@dataclass(frozen=True)
class Groups(Recorded):
    """The search of multipliers, after that of alpha; only in files of older versions, which searched them.

    Attributes:
        multipliers: the chosen ones, by group of tensors; empty where alpha alone is kept.
        reason: for the choice, in a sentence.
        measured: of alpha with the chosen multipliers, against dpo.
    """

    multipliers: Mapping[str, Number]
    reason: str
    trials: tuple[GroupTrial, ...] = ()
    measured: tuple[Measurement, ...] = ()


@dataclass(frozen=True)
class PairResult(Recorded):
    """Results of a pair.

    Attributes:
        sft, dpo: URI with revision.
        decision: the chosen alpha; 0 keeps dpo.
        reason: for the decision, in a sentence or a few.
        measured: the reward model that chooses comes first.
        rejected: by alpha, the stage and the reason of its end.
        effective_alphas: nominal to effective alpha of what was published or served.
        mean_tokens: mean response length by alpha, on the choosing half.
        examples: the prompts whose reward changed most, either way.
        published: folders of published models by alpha.
        pushed: address of the chosen model on the Hub; empty if it was not pushed.
        generations: responses drawn, those of sft for the curve among them.
        rounding: of the weights that were evaluated.
        warnings: what a reader should look at before using the decision.
        considered: the alpha that the search picked, whether it was chosen in the end or not; None where none was left.
        groups: the search of multipliers, in files of older versions; None where none were tried.
        tests: of `considered`, by each reward model in its role; none in files of older versions.
        p_value: of the confirmation, one-sided, with all its looks and reward models; 1 where none was reached. None in files of older versions.
        prompts: how many of them are near-duplicates or share a template, in a sentence; empty if none do.
        looks: at the untouched prompts, by each alpha that was to be confirmed.
        other_looks: at the same prompts, by other searches of the pair; None if there were none.
        asked_again: dpo against itself; None in files of older versions.
        fitted: the curve of the gain over alpha, of the methods that fit it, in rising order of alpha.
        grid_generations: responses that 26 log-spaced alphas and dpo would have drawn on up to 1,000 of the choosing prompts.
    """

    name: str
    sft: str
    dpo: str
    decision: Number
    reason: str
    measured: tuple[Measurement, ...] = ()
    guardrails: tuple[GuardrailCheck, ...] = ()
    rejected: Mapping[AlphaKey, str] = field(default_factory=dict)
    effective_alphas: Mapping[AlphaKey, Number] = field(default_factory=dict)
    mean_tokens: Mapping[AlphaKey, Number] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    published: Mapping[AlphaKey, str] = field(default_factory=dict)
    generations: int = 0
    rounding: str = ""
    warnings: tuple[str, ...] = ()
    considered: Number | None = None
    groups: Groups | None = None
    pushed: str = ""
    tests: tuple[RoleTest, ...] = field(default=(), metadata=ADDED)
    prompts: str = field(default="", metadata=ADDED)
    p_value: Number | None = field(default=None, metadata=ADDED)
    looks: tuple[LooksTaken, ...] = field(default=(), metadata=ADDED)
    other_looks: OtherLooks | None = field(default=None, metadata=ADDED)
    asked_again: AskedAgain | None = field(default=None, metadata=ADDED)
    fitted: tuple[FittedGain, ...] = field(default=(), metadata=ADDED)
    grid_generations: int = field(default=0, metadata=ADDED)

    @property
    def multipliers(self) -> Mapping[str, float]:
        """Multipliers of the chosen alpha, by group of tensors; empty where it is the same in all."""
        return self.groups.multipliers if self.groups else {}

    @property
    def chosen(self) -> tuple[Measurement, ...]:
        """Measurements of the chosen model, with its multipliers; empty where dpo is kept."""
        if self.groups and self.groups.multipliers:
            return self.groups.measured
        if not self.decision:
            return ()
        return tuple(measurement for measurement in self.measured if measurement.alpha == self.decision)

    @property
    def reward_models(self) -> tuple[str, ...]:
        """Names of all reward models, the choosing one first."""
        return tuple(dict.fromkeys(measurement.reward_model for measurement in self.measured))

    @property
    def candidate(self) -> float | None:
        """The alpha whose evidence is shown: the chosen one, else the one that came closest to being chosen, if any was tried."""
        if self.decision or self.considered:
            return self.decision or self.considered
        # Files of older versions lack `considered`.
        tried = [
            each for each in self.measured if each.alpha > 0 and each.reward_model == self.reward_models[0]
        ]
        confirmed = [each for each in tried if each.half == "confirm"]
        best = max(confirmed or tried, key=lambda each: each.gain.mean, default=None)
        return best.alpha if best else None

    def measurement(self, alpha: float | None, half: HalfName, reward_model: str) -> Measurement | None:
        """The measurement of that alpha, half and reward model, if there is one."""
        wanted = (alpha, half, reward_model)
        return next(
            (each for each in self.measured if (each.alpha, each.half, each.reward_model) == wanted), None
        )

    @property
    def headline(self) -> Measurement | None:
        """Measurement used to rank pairs: chosen alpha, first reward model, on the confirming half if it exists."""
        by_half = {each.half: each for each in self.chosen if each.reward_model == self.reward_models[0]}
        return by_half.get("confirm") or by_half.get("choose")


@dataclass(frozen=True)
class Results(Recorded):
    """Results of a run.

    Attributes:
        created: time in UTC, ISO 8601.
        cost: figures with their unit in the name, such as `cpu_hours`, `generated_tokens`, `bytes_written`.
        versions: of expo-ray, Python and the packages that decide results.
        digests: what identifies inputs: prompt sets, reward models, parents.
        failures: error by pair.
        confidence: of all intervals.
    """

    output: str
    created: str
    pairs: tuple[PairResult, ...]
    cost: Mapping[str, Number] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    confidence: Number = 0.95
    format: int = FORMAT

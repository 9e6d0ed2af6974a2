"""What a run has found: the content of `results.json`, and all that the report is drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FORMAT = 1


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One alpha of one pair on one half of the prompts, by one reward model.

    Attributes:
        half: `choose` or `confirm`.
        reward: mean raw reward.
        gain: paired difference to dpo on the same prompts and seeds.
        controlled_gain: the same with the effect of length removed; None where it cannot be told from it.
        win_rate: share of prompts on which it beats dpo, ties as half.
    """

    alpha: float
    half: str
    reward_model: str
    prompts: int
    reward: Estimate
    gain: Estimate
    controlled_gain: Estimate | None
    win_rate: float


@dataclass(frozen=True)
class Guardrail:
    """One measure of one alpha against its limit.

    Attributes:
        name: such as `length ratio`, in words.
        value: what was measured.
        limit: from where on it fails.
        verdict: `pass`, `warn` or `fail`.
    """

    alpha: float
    name: str
    value: float
    limit: float
    verdict: str
    text: str


@dataclass(frozen=True)
class Example:
    """One prompt with the answers of sft, dpo and the chosen alpha.

    Attributes:
        prompt: the last user turn.
        responses: text by model: `sft`, `dpo`, `chosen`; a model without an answer is left out.
        rewards: of the first reward model, likewise.
    """

    prompt: str
    responses: Mapping[str, str]
    rewards: Mapping[str, float]


@dataclass(frozen=True)
class PairResult:
    """Everything about one pair.

    Attributes:
        sft, dpo: URI with revision.
        decision: the chosen alpha; 0 keeps dpo.
        reason: why, in a sentence or a few.
        rejected: why each other alpha fell.
        effective_alphas: nominal to effective alpha of what was published or served.
        mean_tokens: mean response length by alpha.
        published: folders of published models by alpha.
        generations: responses drawn for the search.
    """

    name: str
    sft: str
    dpo: str
    decision: float
    reason: str
    measured: Sequence[Measured] = ()
    guardrails: Sequence[Guardrail] = ()
    rejected: Mapping[float, str] = field(default_factory=dict)
    effective_alphas: Mapping[float, float] = field(default_factory=dict)
    mean_tokens: Mapping[float, float] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    published: Mapping[float, str] = field(default_factory=dict)
    generations: int = 0
    rounding: str = ""


@dataclass(frozen=True)
class Results:
    """A run.

    Attributes:
        cost: figures with their unit in the name, such as `cpu_hours`, `generated_tokens`, `bytes_written`.
        versions: of expo-ray, Python and the packages that decide results.
        digests: what identifies inputs: prompt sets, reward models, parents.
        failures: error by pair.
    """

    output: str
    created: str
    pairs: Sequence[PairResult]
    cost: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

"""The rows of the report's tables, as the template prints them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expo_ray.report.formatting import alpha_text, count, interval, share, signed
from expo_ray.report.results import Example, Measurement, PairResult, Results

NONE = "\u2013"
# Beyond this share, rounding has changed what alpha means.
_EFFECTIVE_TOLERANCE = 0.05


@dataclass(frozen=True)
class OverviewRow:
    """One pair.

    Attributes:
        chosen: whether the figures are of a chosen alpha; else they are of the one that came closest.
        at: that alpha.
        gains: on the choosing prompts by the choosing model, then on the confirming prompts by every model.
    """

    name: str
    anchor: str
    decision: str
    chosen: bool
    at: str
    gains: tuple[str, ...]
    controlled: str
    win_rate: str
    length: str
    generations: str


@dataclass(frozen=True)
class EvidenceRow:
    """One half and one reward model, at the alpha in question."""

    half: str
    reward_model: str
    prompts: str
    dpo: str
    reward: str
    gain: str
    controlled: str
    win_rate: str
    clear: bool


@dataclass(frozen=True)
class AlphaRow:
    """All that is known of one alpha on the choosing prompts.

    Attributes:
        gains: by reward model: gain, the same length-controlled, and win rate.
        guardrails: those that warned or rejected.
    """

    alpha: str
    label: str
    chosen: bool
    prompts: str
    gains: tuple[tuple[str, str, str], ...]
    tokens: str
    effective: str
    off: bool
    guardrails: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class GroupRow:
    """One combination of multipliers that was tried on the chosen alpha."""

    multipliers: str
    chosen: bool
    prompts: str
    gain: str
    reason: str


@dataclass(frozen=True)
class ExampleView:
    """One prompt: its first words, the change of its reward, and the texts side by side: (name, reward, text)."""

    prompt: str
    start: str
    change: str
    gained: bool
    columns: tuple[tuple[str, str, str], ...]


def sorted_pairs(results: Results) -> list[PairResult]:
    """The largest gain first; those that keep dpo gain nothing."""
    return sorted(
        results.pairs, key=lambda pair: (-pair.headline.gain.mean if pair.headline else 0.0, pair.name)
    )


def all_models(results: Results) -> tuple[str, ...]:
    """Reward models of all pairs, those that choose first."""
    pairs = [pair for pair in results.pairs if pair.measured]
    return tuple(
        dict.fromkeys([p.reward_models[0] for p in pairs] + [one for p in pairs for one in p.reward_models])
    )


def decision_text(pair: PairResult) -> str:
    """What was decided, in a few words."""
    if not pair.decision:
        return "keep dpo"
    return ", ".join(
        [f"alpha {alpha_text(pair.decision)}", *filter(None, [multipliers_text(pair.multipliers)])]
    )


def multipliers_text(multipliers: Mapping[str, float]) -> str:
    """What alpha is multiplied by, by group of tensors."""
    return ", ".join(f"{group} \u00d7{alpha_text(factor)}" for group, factor in multipliers.items())


def overview_row(pair: PairResult, anchor: str, models: Sequence[str]) -> OverviewRow:
    """The row of one pair in the table over all."""
    at = pair.candidate
    chooser = pair.reward_models[0] if pair.measured else ""
    chosen = pair.find(at, "choose", chooser)
    headline = pair.headline or pair.find(at, "confirm", chooser) or chosen
    confirmed = [pair.find(at, "confirm", model) for model in models]
    dpo, length = pair.mean_tokens.get(0.0), None if at is None else pair.mean_tokens.get(at)
    return OverviewRow(
        pair.name,
        anchor,
        decision_text(pair),
        pair.decision != 0,
        "" if at is None else alpha_text(at),
        tuple(interval(one.gain) if one else NONE for one in (chosen, *confirmed)),
        _controlled(headline),
        share(headline.win_rate) if headline else NONE,
        f"\u00d7{length / dpo:.2f}" if dpo and length is not None else NONE,
        count(pair.generations),
    )


def evidence_rows(pair: PairResult) -> list[EvidenceRow]:
    """What speaks for the model in question, or against it: both halves, all reward models."""
    rows = []
    for half, name in (("choose", "choosing"), ("confirm", "confirming")):
        for one in pair.chosen or pair.measured:
            if one.alpha == pair.candidate and one.half == half:
                dpo = pair.find(0.0, one.half, one.reward_model)
                rows.append(
                    EvidenceRow(
                        name,
                        one.reward_model,
                        count(one.prompts),
                        signed(dpo.reward.mean) if dpo else NONE,
                        signed(one.reward.mean),
                        interval(one.gain),
                        _controlled(one),
                        share(one.win_rate),
                        one.gain.low > 0,
                    )
                )
    return rows


def alpha_rows(pair: PairResult) -> list[AlphaRow]:
    """Every alpha that was tried or published, in order."""
    tried = {one.alpha for one in pair.measured if one.half == "choose"} | set(pair.rejected)
    alphas = tried | set(pair.published)
    return [_alpha_row(pair, alpha) for alpha in sorted(alphas)]


def _alpha_row(pair: PairResult, alpha: float) -> AlphaRow:
    found = [pair.find(alpha, "choose", model) for model in pair.reward_models]
    effective = pair.effective_alphas.get(alpha)
    tokens = pair.mean_tokens.get(alpha)
    reason = pair.rejected.get(alpha, "interpolates: drawn, never chosen" if alpha < 0 else "")
    if not reason and alpha != pair.decision and not any(found):
        reason = "published because the job lists it; the search did not try it"
    return AlphaRow(
        alpha_text(alpha),
        {-1.0: "sft", 0.0: "dpo"}.get(alpha, ""),
        alpha == pair.decision,
        next((count(one.prompts) for one in found if one), NONE),
        tuple(
            (interval(one.gain), _controlled(one), share(one.win_rate)) if one else (NONE, NONE, NONE)
            for one in found
        ),
        f"{tokens:.0f}" if tokens is not None else NONE,
        f"{effective:.3f}" if effective is not None else NONE,
        effective is not None and abs(effective - alpha) > _EFFECTIVE_TOLERANCE * abs(alpha),
        tuple(
            f"{'rejected' if one.verdict == 'reject' else 'warned'}: {one.text}"
            for one in pair.guardrails
            if one.alpha == alpha and one.verdict != "ok" and one.text not in reason
        ),
        reason,
    )


def group_rows(pair: PairResult) -> list[GroupRow]:
    """Every combination of multipliers that was tried."""
    return [
        GroupRow(
            multipliers_text(one.multipliers),
            one.multipliers == pair.multipliers,
            count(one.prompts),
            interval(one.gain),
            one.reason,
        )
        for one in (pair.groups.trials if pair.groups else ())
    ]


def example_views(pair: PairResult) -> list[ExampleView]:
    """The largest rise in reward first, the largest fall last."""
    shown = decision_text(pair) if pair.decision else "alpha"
    at = shown if pair.decision or pair.candidate is None else f"alpha {alpha_text(pair.candidate)}"
    names = {"sft": "sft", "dpo": "dpo", "chosen": at, "candidate": at}
    return [_example(one, names) for one in sorted(pair.examples, key=lambda one: -(_change(one) or 0.0))]


def _example(one: Example, names: Mapping[str, str]) -> ExampleView:
    words, change = " ".join(one.prompt.split()), _change(one)
    return ExampleView(
        one.prompt,
        words if len(words) <= 90 else words[:89].rstrip() + "\u2026",
        "" if change is None else signed(change),
        change is not None and change >= 0,
        tuple(
            (name, signed(one.rewards[side]) if side in one.rewards else NONE, one.responses[side])
            for side, name in names.items()
            if side in one.responses
        ),
    )


def _change(one: Example) -> float | None:
    """What the alpha in question changed in the reward of dpo's answer."""
    after = one.rewards.get("chosen", one.rewards.get("candidate"))
    return None if after is None or "dpo" not in one.rewards else after - one.rewards["dpo"]


def _controlled(one: Measurement | None) -> str:
    return interval(one.controlled_gain) if one and one.controlled_gain else NONE

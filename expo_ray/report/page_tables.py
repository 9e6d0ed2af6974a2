"""Rows of the report's tables, as the template prints them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expo_ray.report.formatting import alpha_text, count, interval, share, signed
from expo_ray.report.results import Example, LooksTaken, Measurement, PairResult, Results, RoleTest

NONE = "\u2013"
# Beyond this share, rounding has changed what alpha means.
_EFFECTIVE_TOLERANCE = 0.05


@dataclass(frozen=True)
class OverviewRow:
    """Row of a pair in the overview.

    Attributes:
        link: to what the report says of the pair.
        warnings: how many there are; empty if none.
        chosen: True if the figures are of a chosen alpha; else they are of the one that came closest.
        at: the alpha of the figures.
        gains: on the choosing prompts by the choosing model, then on the confirming prompts by every model.
    """

    name: str
    link: str
    decision: str
    warnings: str
    chosen: bool
    at: str
    gains: tuple[str, ...]
    controlled: str
    win_rate: str
    length: str
    generations: str


@dataclass(frozen=True)
class EvidenceRow:
    """Evidence from a half by a reward model, at the alpha in question.

    Attributes:
        role: of the reward model; empty where the file does not say.
        verdict: of its test; empty where these prompts had no say in the confirmation.
    """

    half: str
    reward_model: str
    prompts: str
    dpo: str
    reward: str
    gain: str
    controlled: str
    win_rate: str
    role: str
    verdict: str


@dataclass(frozen=True)
class AlphaRow:
    """Results of an alpha on the choosing prompts.

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
    """Result of multipliers that were tried on the chosen alpha."""

    multipliers: str
    chosen: bool
    prompts: str
    gain: str
    reason: str


@dataclass(frozen=True)
class ExampleView:
    """A prompt: its first words, the change of its reward, and the texts side by side: (name, reward, text)."""

    prompt: str
    start: str
    change: str
    gained: bool
    columns: tuple[tuple[str, str, str], ...]


def sorted_pairs(results: Results) -> list[PairResult]:
    """Pairs by their gain, the largest first; those that keep dpo gain nothing."""
    return sorted(
        results.pairs, key=lambda pair: (-pair.headline.gain.mean if pair.headline else 0.0, pair.name)
    )


def all_models(results: Results) -> tuple[str, ...]:
    """Reward models of all pairs, those that choose first."""
    pairs = [pair for pair in results.pairs if pair.measured]
    return tuple(
        dict.fromkeys(
            [p.reward_models[0] for p in pairs] + [model for p in pairs for model in p.reward_models]
        )
    )


def decision_text(pair: PairResult) -> str:
    """The decision in a few words."""
    if not pair.decision:
        return "keep dpo"
    return ", ".join(
        [f"alpha {alpha_text(pair.decision)}", *filter(None, [multipliers_text(pair.multipliers)])]
    )


def multipliers_text(multipliers: Mapping[str, float]) -> str:
    """Multipliers of alpha, by group of tensors."""
    return ", ".join(f"{group} \u00d7{alpha_text(factor)}" for group, factor in multipliers.items())


def overview_row(pair: PairResult, link: str, models: Sequence[str]) -> OverviewRow:
    """The row of one pair in the table over all."""
    warnings = len(pair.warnings)
    at = pair.candidate
    chooser = pair.reward_models[0] if pair.measured else ""
    chosen = pair.measurement(at, "choose", chooser)
    headline = pair.headline or pair.measurement(at, "confirm", chooser) or chosen
    confirmed = [pair.measurement(at, "confirm", model) for model in models]
    dpo, length = pair.mean_tokens.get(0.0), None if at is None else pair.mean_tokens.get(at)
    return OverviewRow(
        pair.name,
        link,
        decision_text(pair),
        f"{warnings} warning{'s' * (warnings > 1)}" if warnings else "",
        pair.decision != 0,
        "" if at is None else alpha_text(at),
        tuple(interval(measured.gain) if measured else NONE for measured in (chosen, *confirmed)),
        _controlled(headline),
        share(headline.win_rate) if headline else NONE,
        f"\u00d7{length / dpo:.2f}" if dpo and length is not None else NONE,
        count(pair.generations),
    )


@dataclass(frozen=True)
class ChanceRow:
    """What chance has to do with the confirmation of a pair, among all pairs of a run."""

    name: str
    decision: str
    p_value: str
    q_value: str


def chance_rows(results: Results) -> list[ChanceRow]:
    """The p and q values of all pairs that have one, the smallest first; none where there are fewer than two."""
    tested = [(pair.p_value, pair) for pair in results.pairs if pair.p_value is not None]
    if len(tested) < 2:
        return []
    tested.sort(key=lambda item: (item[0], item[1].name))
    q_values = false_discovery_rates([p_value for p_value, _ in tested])
    return [
        ChanceRow(pair.name, decision_text(pair), f"{p_value:.2g}", f"{q_value:.2g}")
        for (p_value, pair), q_value in zip(tested, q_values, strict=True)
    ]


def false_discovery_rates(p_values: Sequence[float]) -> list[float]:
    """The q values of p values in rising order (Benjamini and Hochberg 1995).

    Keeping all with a q value up to 0.05 keeps the expected share of false ones among them at most that.
    """
    q_values, smallest = list[float](), 1.0
    for rank in range(len(p_values), 0, -1):
        smallest = min(smallest, p_values[rank - 1] * len(p_values) / rank)
        q_values.insert(0, smallest)
    return q_values


def evidence_rows(pair: PairResult) -> list[EvidenceRow]:
    """Evidence for or against the model in question: both halves, all reward models, each with its test where it decided; dpo against itself."""
    measured_halves = {measured.half for measured in pair.measured if measured.alpha == pair.candidate}
    last = "confirm" if "confirm" in measured_halves else "choose"
    rows = []
    for half, name in (("choose", "choosing"), ("confirm", "confirming")):
        for measured in pair.chosen or pair.measured:
            if measured.alpha == pair.candidate and measured.half == half:
                dpo = pair.measurement(0.0, measured.half, measured.reward_model)
                test = next((test for test in pair.tests if test.reward_model == measured.reward_model), None)
                rows.append(
                    EvidenceRow(
                        name,
                        measured.reward_model,
                        count(measured.prompts),
                        signed(dpo.reward.mean) if dpo else NONE,
                        signed(measured.reward.mean),
                        interval(measured.gain),
                        _controlled(measured),
                        share(measured.win_rate),
                        _role_text(test) if test else "",
                        _verdict_text(measured, test) if half == last else "",
                    )
                )
    return rows + _asked_again_rows(pair)


def _asked_again_rows(pair: PairResult) -> list[EvidenceRow]:
    """The change of dpo's rewards from its stored responses to those at the end of the search, by each reward model."""
    again = pair.asked_again
    if again is None:
        return []
    same = f"{count(again.same)} of {count(again.responses)} responses the same"
    return [
        EvidenceRow(
            "dpo again", model, count(again.prompts), NONE, NONE, interval(change), NONE, NONE, f"A/A, {again.confidence:.0%}",
            f"{same}; {'changed beyond chance' if model in again.drifted else 'no change beyond chance'}",
        )
        for model, change in again.changes.items()
    ]  # fmt: skip


def course_rows(pair: PairResult) -> list[tuple[str, str]]:
    """How the search went: where each confirmation ended, who else looked at its prompts, what it drew."""
    rows = [("confirmation", _looks_text(looks)) for looks in pair.looks]
    if pair.other_looks:
        searches, looks = pair.other_looks.searches, pair.other_looks.looks
        text = (
            f"{count(searches)} other {'search' if searches == 1 else 'searches'} of this pair looked {count(looks)} "
            f"{'time' if looks == 1 else 'times'} at the same untouched prompts"
        )
        if pair.p_value is not None and pair.looks:
            corrected = min(1.0, pair.p_value * (1 + searches))
            text += f"; corrected for all of them (Bonferroni), p is at most {corrected:.2g}"
        rows.append(("other searches", text))
    if pair.grid_generations:
        grid = f"26 log-spaced alphas and dpo would have taken {count(pair.grid_generations)}"
        rows.append(("responses", f"{count(pair.generations)}; {grid}"))
    return rows


def _looks_text(looks: LooksTaken) -> str:
    alpha, most = f"alpha {alpha_text(looks.alpha)}", count(looks.most)
    where = f"{count(looks.prompts)} untouched prompts, at look {looks.looks}"
    if looks.ended == "passed":
        return f"{alpha} passed on {where}; up to {most} might have been asked"
    if looks.ended == "futile":
        return f"{alpha} was given up on {where}: not even the optimistic end of its gain could have passed on {most}"
    return f"{alpha} did not pass on all {where}"


def _role_text(test: RoleTest) -> str:
    """What a reward model asks for."""
    if test.margin is None:
        return f"{test.role}s: a gain"
    name = "joint" if test.role == "joint" else f"{test.role}s"
    return f"{name}: no loss beyond {-test.limit:.3f} ({test.margin:g} sd)"


def _verdict_text(measured: Measurement, test: RoleTest | None) -> str:
    """What the deciding prompts showed."""
    if test is None or test.margin is None:
        passed = measured.gain.low > 0 if test is None else test.passed
        # From half the width of the interval, for an error of 2.5 % and a power of 80 %.
        visible = (measured.gain.mean - measured.gain.low) * 1.43
        return (
            "gains beyond chance"
            if passed
            else f"no gain beyond chance; {signed(visible)} would show in four of five cases"
        )
    return "no such loss" if test.passed else "such a loss is not excluded"


def alpha_rows(pair: PairResult) -> list[AlphaRow]:
    """Every alpha that was tried or published, in order."""
    tried = {measured.alpha for measured in pair.measured if measured.half == "choose"} | set(pair.rejected)
    alphas = tried | set(pair.published)
    return [_alpha_row(pair, alpha) for alpha in sorted(alphas)]


def _alpha_row(pair: PairResult, alpha: float) -> AlphaRow:
    measurements = [pair.measurement(alpha, "choose", model) for model in pair.reward_models]
    effective = pair.effective_alphas.get(alpha)
    tokens = pair.mean_tokens.get(alpha)
    reason = pair.rejected.get(alpha, "interpolates: drawn, never chosen" if alpha < 0 else "")
    if not reason and alpha != pair.decision and not any(measurements):
        reason = "published because the job lists it; the search did not try it"
    return AlphaRow(
        alpha_text(alpha),
        {-1.0: "sft", 0.0: "dpo"}.get(alpha, ""),
        alpha == pair.decision,
        next((count(measured.prompts) for measured in measurements if measured), NONE),
        tuple(
            (interval(measured.gain), _controlled(measured), share(measured.win_rate))
            if measured
            else (NONE, NONE, NONE)
            for measured in measurements
        ),
        f"{tokens:.0f}" if tokens is not None else NONE,
        f"{effective:.3f}" if effective is not None else NONE,
        effective is not None and abs(effective - alpha) > _EFFECTIVE_TOLERANCE * abs(alpha),
        tuple(
            f"{'rejected' if check.verdict == 'reject' else 'warned'}: {check.text}"
            for check in pair.guardrails
            if check.alpha == alpha and check.verdict != "ok" and check.text not in reason
        ),
        reason,
    )


def group_rows(pair: PairResult) -> list[GroupRow]:
    """Every combination of multipliers that was tried."""
    return [
        GroupRow(
            multipliers_text(trial.multipliers),
            trial.multipliers == pair.multipliers,
            count(trial.prompts),
            interval(trial.gain),
            trial.reason,
        )
        for trial in (pair.groups.trials if pair.groups else ())
    ]


def example_views(pair: PairResult) -> list[ExampleView]:
    """The largest rise in reward first, the largest fall last."""
    shown = decision_text(pair) if pair.decision else "alpha"
    at = shown if pair.decision or pair.candidate is None else f"alpha {alpha_text(pair.candidate)}"
    names = {"sft": "sft", "dpo": "dpo", "chosen": at, "candidate": at}
    return [
        _example(example, names)
        for example in sorted(pair.examples, key=lambda example: -(_change(example) or 0.0))
    ]


def _example(example: Example, names: Mapping[str, str]) -> ExampleView:
    words, change = " ".join(example.prompt.split()), _change(example)
    return ExampleView(
        example.prompt,
        words if len(words) <= 90 else words[:89].rstrip() + "\u2026",
        "" if change is None else signed(change),
        change is not None and change >= 0,
        tuple(
            (
                name,
                signed(example.rewards[side]) if side in example.rewards else NONE,
                example.responses[side],
            )
            for side, name in names.items()
            if side in example.responses
        ),
    )


def _change(example: Example) -> float | None:
    """Change of the reward from dpo's answer to that of the alpha in question; None if either is missing."""
    after = example.rewards.get("chosen", example.rewards.get("candidate"))
    return None if after is None or "dpo" not in example.rewards else after - example.rewards["dpo"]


def _controlled(measured: Measurement | None) -> str:
    return interval(measured.controlled_gain) if measured and measured.controlled_gain else NONE

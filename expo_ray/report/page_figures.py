"""What is drawn of one pair: reward, length and guardrails over alpha."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from expo_ray.config import format_alpha
from expo_ray.report.alpha_axis import draw_alpha_axis
from expo_ray.report.formatting import GUARDRAILS, LENGTH, count, guardrail_value, interval, signed
from expo_ray.report.results import GuardrailCheck, HalfName, Measurement, PairResult, Verdict
from expo_ray.report.svg import BLUE, GREEN, GREY, ORANGE, Drawing, figure_style, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches. At 360 pixels a figure of this width shows its 11-point text at about 10 pixels.
_WIDTH, _HEIGHT, _ROW = 4.7, 3.5, 1.25
# Beyond it the transformations of an axis are singular.
_LARGEST = 1e30
_HALVES: Mapping[HalfName, str] = {"choose": "choosing prompts", "confirm": "confirming prompts"}
_LEGEND = "Dotted line: warns; dashed line: rejects. Circle: passes; triangle: warned; cross: rejected."
_MARKERS: Mapping[Verdict, tuple[str, str]] = {
    "ok": ("o", BLUE),
    "warn": ("^", ORANGE),
    "reject": ("X", "#000000"),
}


def drawings_of(pair: PairResult, name: str, confidence: float) -> list[Drawing]:
    """All figures of a pair; `name` is the prefix of their ids."""
    pair = _drawable(pair)
    if not _fits(pair.decision):
        return []
    found = [
        _drawn(f"{name}-reward{number}", partial(_reward, pair=pair, model=model, confidence=confidence))
        for number, model in enumerate(pair.reward_models)
    ]
    if pair.mean_tokens:
        found.append(_drawn(f"{name}-length", partial(_length, pair=pair)))
    shown = [one for one in GUARDRAILS if any(guard.name == one for guard in pair.guardrails)]
    if 0.0 in pair.mean_tokens and LENGTH in shown:
        shown.remove(LENGTH)  # the figure of lengths has its limits
    if shown:
        height = 0.6 + _ROW * len(shown)
        found.append(_drawn(f"{name}-guardrails", partial(_guardrails, pair=pair, names=shown), height))
    return found


def _drawable(pair: PairResult) -> PairResult:
    """`pair` without the points that no axis can hold; the tables show them."""
    measured = tuple(
        row
        for row in pair.measured
        if _fits(row.alpha, row.gain.mean, row.gain.low, row.gain.high, row.reward.mean)
        and (row.controlled_gain is None or _fits(row.controlled_gain.mean))
    )
    guardrails = tuple(
        guard for guard in pair.guardrails if _fits(guard.alpha, guard.value, guard.limit, guard.warn or 0.0)
    )
    tokens = {alpha: mean for alpha, mean in pair.mean_tokens.items() if _fits(alpha, mean)}
    return replace(pair, measured=measured, guardrails=guardrails, mean_tokens=tokens)


def _fits(*values: float) -> bool:
    return all(abs(value) < _LARGEST for value in values)  # False for NaN


def _drawn(name: str, draw: Callable[[Figure], tuple[str, str, str]], height: float = _HEIGHT) -> Drawing:
    from matplotlib.figure import Figure

    with figure_style(name):
        figure = Figure(figsize=(_WIDTH, height))
        title, caption, description = draw(figure)
        return Drawing(inline_svg(figure, name, title, description), title, caption)


def _reward(figure: Figure, pair: PairResult, model: str, confidence: float) -> tuple[str, str, str]:
    axes = figure.add_subplot()
    halves: Mapping[HalfName, list[Measurement]] = {
        half: sorted(
            (one for one in pair.measured if (one.half, one.reward_model) == (half, model)),
            key=lambda one: one.alpha,
        )
        for half in ("choose", "confirm")
    }
    choose, confirm = halves["choose"], halves["confirm"]
    _curve(axes, choose)
    controlled = [(one.alpha, one.controlled_gain.mean) for one in choose if one.controlled_gain]
    if controlled:
        axes.plot(
            *zip(*controlled, strict=True), ":D", color=GREEN, markersize=3.5, label="length-controlled"
        )
    if confirm:
        _points(axes, confirm)
    axes.axhline(0, color=GREY, linewidth=0.9, zorder=1)
    axes.set_ylabel("gain in reward over dpo")
    draw_alpha_axis(axes, [one.alpha for one in (*choose, *confirm)])
    _mark_decision(axes, pair)
    _legend(figure)
    best = max(choose or confirm, key=lambda one: one.gain.mean)
    return (
        f"Reward by {model}",
        f"{_halves(halves)} Band and bars: {confidence:.0%} intervals of the difference to dpo on the same prompts and seeds.",
        f"Gain in mean reward over dpo, by {model}, against alpha. "
        + "; ".join(f"alpha {format_alpha(one.alpha)}: {interval(one.gain)}" for one in choose)
        + f". Largest at alpha {format_alpha(best.alpha)}. {_decided(pair)}.",
    )


def _curve(axes: Axes, rows: Sequence[Measurement]) -> None:
    if rows:
        alphas = [one.alpha for one in rows]
        axes.fill_between(
            alphas, [one.gain.low for one in rows], [one.gain.high for one in rows], color=BLUE, alpha=0.18, linewidth=0,
        )  # fmt: skip
        axes.plot(
            alphas, [one.gain.mean for one in rows], "-o", color=BLUE, label=_HALVES["choose"], zorder=3
        )


def _points(axes: Axes, rows: Sequence[Measurement]) -> None:
    box: dict[str, Any] = {
        "markersize": 8,
        "markerfacecolor": "white",
        "markeredgewidth": 1.8,
        "color": ORANGE,
    }
    below = [one.gain.mean - one.gain.low for one in rows]
    above = [one.gain.high - one.gain.mean for one in rows]
    axes.errorbar(
        [one.alpha for one in rows], [one.gain.mean for one in rows], yerr=[below, above], fmt="s", capsize=5, zorder=4, **box
    )  # fmt: skip
    axes.plot([], [], "s", label=_HALVES["confirm"], **box)


def _halves(halves: Mapping[HalfName, Sequence[Measurement]]) -> str:
    """The reward of dpo itself, from which the figure counts."""
    texts = []
    for half, rows in halves.items():
        dpo = next((one for one in rows if one.alpha == 0), None)
        if dpo:
            prompts = sorted({one.prompts for one in rows})
            numbers = (
                count(prompts[0]) if len(prompts) == 1 else f"{count(prompts[0])} to {count(prompts[-1])}"
            )
            texts.append(f"{_HALVES[half].capitalize()} ({numbers}): dpo has {signed(dpo.reward.mean)}.")
    return " ".join(texts)


def _length(figure: Figure, pair: PairResult) -> tuple[str, str, str]:
    axes = figure.add_subplot()
    rows = sorted(pair.mean_tokens.items())
    axes.plot(*zip(*rows, strict=True), "-o", color=BLUE, label="mean length", zorder=3)
    dpo = pair.mean_tokens.get(0.0)
    guards = [one for one in pair.guardrails if one.name == LENGTH and one.alpha in pair.mean_tokens]
    if dpo and guards:
        _limits(axes, guards[0], dpo)
        _verdicts(axes, [(one.alpha, pair.mean_tokens[one.alpha], one.verdict) for one in guards])
        axes.set_ylim(0, max(*(tokens for _, tokens in rows), dpo * guards[0].limit) * 1.06)
    axes.set_ylabel("tokens")
    draw_alpha_axis(axes, pair.mean_tokens)
    _mark_decision(axes, pair)
    _legend(figure)
    return (
        "Length of responses",
        f"Mean tokens of a response; reward models tend to like longer ones.{f' {_LEGEND}' if guards else ''}",
        "Mean tokens of a response against alpha. "
        + "; ".join(f"alpha {format_alpha(alpha)}: {tokens:.0f}" for alpha, tokens in rows)
        + f". {_decided(pair)}.",
    )


def _limits(axes: Axes, guard: GuardrailCheck, scale: float = 1.0) -> None:
    if guard.warn is not None:
        axes.axhline(guard.warn * scale, color=ORANGE, linewidth=1.2, linestyle=":", label="warns")
    axes.axhline(guard.limit * scale, color="#000000", linewidth=1.2, linestyle=(0, (6, 3)), label="rejects")


def _verdicts(axes: Axes, points: Sequence[tuple[float, float, Verdict]]) -> None:
    for verdict, (marker, colour) in _MARKERS.items():
        some = [(alpha, value) for alpha, value, found in points if found == verdict]
        if some:
            axes.plot(*zip(*some, strict=True), marker, color=colour, markersize=7, zorder=3)


def _guardrails(figure: Figure, pair: PairResult, names: Sequence[str]) -> tuple[str, str, str]:
    rows = [
        sorted((one for one in pair.guardrails if one.name == name), key=lambda one: one.alpha)
        for name in names
    ]
    alphas = {one.alpha for row in rows for one in row}
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name, row in zip(all_axes, names, rows, strict=True):
        axes.plot([one.alpha for one in row], [one.value for one in row], "-", color=BLUE, zorder=2)
        _verdicts(axes, [(one.alpha, one.value, one.verdict) for one in row])
        _limits(axes, row[0])
        axes.set_title(GUARDRAILS[name], loc="left", fontsize=11)
        axes.yaxis.set_major_formatter(lambda value, _, name=name: guardrail_value(name, value))
        axes.locator_params(axis="y", nbins=4)
        draw_alpha_axis(axes, alphas, label=axes is all_axes[-1])
        _mark_decision(axes, pair)
    return (
        "Guardrails",
        f"Against dpo on the same prompts. {_LEGEND} Dash-dotted: the chosen alpha.",
        "Guardrails against alpha. "
        + ". ".join(
            f"{GUARDRAILS[name]}: "
            + "; ".join(
                f"alpha {format_alpha(one.alpha)} {guardrail_value(name, one.value)} ({one.verdict})"
                for one in row
            )
            for name, row in zip(names, rows, strict=True)
        )
        + ".",
    )


def _mark_decision(axes: Axes, pair: PairResult) -> None:
    label = f"chosen: {format_alpha(pair.decision)}" if pair.decision else "chosen: 0 (dpo)"
    axes.axvline(pair.decision, color="#000000", linewidth=1.6, linestyle="-.", zorder=2, label=label)


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside upper left", ncols=2, borderaxespad=0.2, columnspacing=1.2)


def _decided(pair: PairResult) -> str:
    return f"Chosen: alpha {format_alpha(pair.decision)}" if pair.decision else "Chosen: dpo itself, alpha 0"

"""Figures of a pair: reward, length and guardrails over alpha."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from expo_ray.config import format_alpha
from expo_ray.config.guardrails import GUARDRAILS
from expo_ray.report.formatting import count, guardrail_value, interval, signed
from expo_ray.report.results import FittedGain, GuardrailCheck, HalfName, Measurement, PairResult, Verdict
from expo_ray.report.svg import BLUE, GREEN, GREY, ORANGE, Drawing, figure_style, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches. At 360 pixels a figure of this width shows its 11-point text at about 10 pixels.
_WIDTH, _HEIGHT, _ROW = 4.7, 3.5, 1.25
# Beyond it the transformations of an axis are singular.
_LARGEST = 1e30
_LENGTH = "length ratio"
_HALVES: Mapping[HalfName, str] = {"choose": "choosing prompts", "confirm": "confirming prompts"}
_LEGEND = "Dotted line: warns; dashed line: rejects. Circle: passes; triangle: warned; cross: rejected."
_MARKERS: Mapping[Verdict, tuple[str, str]] = {
    "ok": ("o", BLUE),
    "warn": ("^", ORANGE),
    "reject": ("X", "#000000"),
}


# The axis reaches from sft at -1 through dpo at 0 to alphas of any size: about linear between sft and small alphas, about logarithmic from 1 on.
_LINEAR_WIDTH = 0.3
_TICKS = (-1, 0, 1, 4, 16, 64, 256, 0.3, 2, 8, 32, 128, -0.5, 0.5, 0.1, 0.2, 0.05, 0.02, 0.01)
_TICK_NAMES = {-1.0: "\u22121\nsft", 0.0: "0\ndpo"}
# Share of the axis that a label takes.
_SPACING = 0.075


def draw_pair(pair: PairResult, name: str, confidence: float) -> list[Drawing]:
    """Draw all figures of a pair; `name` is the prefix of their ids."""
    pair = _drawable(pair)
    if not _fits(pair.decision):
        return []
    drawings = [
        _draw_reward(f"{name}-reward{number}", pair, model, confidence)
        for number, model in enumerate(pair.reward_models)
    ]
    if pair.mean_tokens:
        drawings.append(_draw_length(f"{name}-length", pair))
    checked = {check.name for check in pair.guardrails}
    shown = [name for name in GUARDRAILS if name in checked]
    if 0.0 in pair.mean_tokens and _LENGTH in shown:
        shown.remove(_LENGTH)  # the figure of lengths has its limits
    if shown:
        drawings.append(_draw_guardrails(f"{name}-guardrails", pair, shown))
    return drawings


def _drawable(pair: PairResult) -> PairResult:
    """`pair` without the points that no axis can hold; the tables show them."""
    measured = tuple(
        row
        for row in pair.measured
        if _fits(row.alpha, row.gain.mean, row.gain.low, row.gain.high, row.reward.mean)
        and (row.controlled_gain is None or _fits(row.controlled_gain.mean))
    )
    guardrails = tuple(
        check for check in pair.guardrails if _fits(check.alpha, check.value, check.limit, check.warn or 0.0)
    )
    fitted = tuple(
        point for point in pair.fitted if _fits(point.alpha, point.gain.mean, point.gain.low, point.gain.high)
    )
    tokens = {alpha: mean for alpha, mean in pair.mean_tokens.items() if _fits(alpha, mean)}
    return replace(pair, measured=measured, guardrails=guardrails, mean_tokens=tokens, fitted=fitted)


def _fits(*values: float) -> bool:
    return all(abs(value) < _LARGEST for value in values)  # False for NaN


@contextmanager
def _new_figure(name: str, height: float = _HEIGHT) -> Iterator[Figure]:
    from matplotlib.figure import Figure

    with figure_style(name):
        yield Figure(figsize=(_WIDTH, height))


def _drawing(figure: Figure, name: str, title: str, caption: str, description: str) -> Drawing:
    """Turn a figure into a part of the page, still in the style that it was drawn in."""
    return Drawing(inline_svg(figure, name, title, description), title, caption)


def _draw_reward(name: str, pair: PairResult, model: str, confidence: float) -> Drawing:
    with _new_figure(name) as figure:
        axes = figure.add_subplot()
        halves: Mapping[HalfName, list[Measurement]] = {
            half: sorted(
                (row for row in pair.measured if (row.half, row.reward_model) == (half, model)),
                key=lambda row: row.alpha,
            )
            for half in ("choose", "confirm")
        }
        choose, confirm = halves["choose"], halves["confirm"]
        fitted = pair.fitted if model == pair.reward_models[0] else ()
        if fitted:
            _draw_fitted(axes, fitted)
            _draw_points(axes, choose, "choose")
        else:
            _draw_curve(axes, choose)
        controlled = [(row.alpha, row.controlled_gain.mean) for row in choose if row.controlled_gain]
        if controlled:
            axes.plot(
                *zip(*controlled, strict=True), ":D", color=GREEN, markersize=3.5, label="length-controlled"
            )
        if confirm:
            _draw_points(axes, confirm, "confirm")
        axes.axhline(0, color=GREY, linewidth=0.9, zorder=1)
        axes.set_ylabel("gain in reward over dpo")
        _draw_alpha_axis(axes, [row.alpha for row in (*choose, *confirm)])
        _mark_decision(axes, pair)
        _add_legend(figure)
        best = max(choose or confirm, key=lambda row: row.gain.mean)
        return _drawing(
            figure,
            name,
            f"Reward by {model}",
            f"{_describe_halves(halves)} {_describe_band(confidence, is_fitted=bool(fitted))}",
            f"Gain in mean reward over dpo, by {model}, against alpha. "
            + "; ".join(f"alpha {format_alpha(row.alpha)}: {interval(row.gain)}" for row in choose)
            + f". Largest at alpha {format_alpha(best.alpha)}. {_decided(pair)}.",
        )


def _draw_curve(axes: Axes, rows: Sequence[Measurement]) -> None:
    if rows:
        alphas = [row.alpha for row in rows]
        axes.fill_between(
            alphas, [row.gain.low for row in rows], [row.gain.high for row in rows], color=BLUE, alpha=0.18, linewidth=0,
        )  # fmt: skip
        axes.plot(
            alphas, [row.gain.mean for row in rows], "-o", color=BLUE, label=_HALVES["choose"], zorder=3
        )


def _draw_fitted(axes: Axes, points: Sequence[FittedGain]) -> None:
    """Draw the curve through all measurements, from dpo on."""
    alphas, gains = [0.0, *(point.alpha for point in points)], [point.gain for point in points]
    low, mean, high = ([0.0, *(getattr(gain, end) for gain in gains)] for end in ("low", "mean", "high"))
    axes.fill_between(alphas, low, high, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(alphas, mean, "-", color=BLUE, label="fitted curve", zorder=3)


def _describe_band(confidence: float, *, is_fitted: bool) -> str:
    bars = f"{confidence:.0%} intervals of the difference to dpo on the same prompts and seeds."
    if not is_fitted:
        return f"Band and bars: {bars}"
    return f"Line and band: the curve through all choosing prompts, and {confidence:.0%} of its draws at each alpha. Bars: {bars}"


def _draw_points(axes: Axes, rows: Sequence[Measurement], half: HalfName) -> None:
    box: dict[str, Any] = {
        "markersize": 8 if half == "confirm" else 5,
        "markerfacecolor": "white" if half == "confirm" else BLUE,
        "markeredgewidth": 1.8,
        "color": ORANGE if half == "confirm" else BLUE,
    }
    marker = "s" if half == "confirm" else "o"
    below = [row.gain.mean - row.gain.low for row in rows]
    above = [row.gain.high - row.gain.mean for row in rows]
    axes.errorbar(
        [row.alpha for row in rows], [row.gain.mean for row in rows], yerr=[below, above], fmt=marker, capsize=5, zorder=4, **box
    )  # fmt: skip
    axes.plot([], [], marker, label=_HALVES[half], **box)


def _describe_halves(halves: Mapping[HalfName, Sequence[Measurement]]) -> str:
    """The reward of dpo itself, from which the figure counts."""
    texts = []
    for half, rows in halves.items():
        dpo = next((row for row in rows if row.alpha == 0), None)
        if dpo:
            prompts = sorted({row.prompts for row in rows})
            numbers = (
                count(prompts[0]) if len(prompts) == 1 else f"{count(prompts[0])} to {count(prompts[-1])}"
            )
            texts.append(f"{_HALVES[half].capitalize()} ({numbers}): dpo has {signed(dpo.reward.mean)}.")
    return " ".join(texts)


def _draw_length(name: str, pair: PairResult) -> Drawing:
    with _new_figure(name) as figure:
        axes = figure.add_subplot()
        rows = sorted(pair.mean_tokens.items())
        axes.plot(*zip(*rows, strict=True), "-o", color=BLUE, label="mean length", zorder=3)
        dpo = pair.mean_tokens.get(0.0)
        checks = [
            check for check in pair.guardrails if check.name == _LENGTH and check.alpha in pair.mean_tokens
        ]
        if dpo and checks:
            _draw_limits(axes, checks[0], dpo)
            _mark_verdicts(
                axes, [(check.alpha, pair.mean_tokens[check.alpha], check.verdict) for check in checks]
            )
            axes.set_ylim(0, max(*(tokens for _, tokens in rows), dpo * checks[0].limit) * 1.06)
        axes.set_ylabel("tokens")
        _draw_alpha_axis(axes, pair.mean_tokens)
        _mark_decision(axes, pair)
        _add_legend(figure)
        return _drawing(
            figure,
            name,
            "Length of responses",
            f"Mean tokens of a response; reward models tend to like longer ones.{f' {_LEGEND}' if checks else ''}",
            "Mean tokens of a response against alpha. "
            + "; ".join(f"alpha {format_alpha(alpha)}: {tokens:.0f}" for alpha, tokens in rows)
            + f". {_decided(pair)}.",
        )


def _draw_limits(axes: Axes, check: GuardrailCheck, scale: float = 1.0) -> None:
    if check.warn is not None:
        axes.axhline(check.warn * scale, color=ORANGE, linewidth=1.2, linestyle=":", label="warns")
    axes.axhline(check.limit * scale, color="#000000", linewidth=1.2, linestyle=(0, (6, 3)), label="rejects")


def _mark_verdicts(axes: Axes, points: Sequence[tuple[float, float, Verdict]]) -> None:
    for verdict, (marker, colour) in _MARKERS.items():
        marked = [(alpha, value) for alpha, value, of_point in points if of_point == verdict]
        if marked:
            axes.plot(*zip(*marked, strict=True), marker, color=colour, markersize=7, zorder=3)


def _draw_guardrails(name: str, pair: PairResult, guardrails: Sequence[str]) -> Drawing:
    with _new_figure(name, height=0.6 + _ROW * len(guardrails)) as figure:
        rows = [
            sorted(
                (check for check in pair.guardrails if check.name == guardrail), key=lambda check: check.alpha
            )
            for guardrail in guardrails
        ]
        alphas = {check.alpha for row in rows for check in row}
        all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        for axes, guardrail, row in zip(all_axes, guardrails, rows, strict=True):
            axes.plot(
                [check.alpha for check in row], [check.value for check in row], "-", color=BLUE, zorder=2
            )
            _mark_verdicts(axes, [(check.alpha, check.value, check.verdict) for check in row])
            _draw_limits(axes, row[0])
            axes.set_title(GUARDRAILS[guardrail].title, loc="left", fontsize=11)
            axes.yaxis.set_major_formatter(lambda value, _, name=guardrail: guardrail_value(name, value))
            axes.locator_params(axis="y", nbins=4)
            _draw_alpha_axis(axes, alphas, label=axes is all_axes[-1])
            _mark_decision(axes, pair)
        return _drawing(
            figure,
            name,
            "Guardrails",
            f"Against dpo on the same prompts. {_LEGEND} Dash-dotted: the chosen alpha.",
            "Guardrails against alpha. "
            + ". ".join(
                f"{GUARDRAILS[guardrail].title}: "
                + "; ".join(
                    f"alpha {format_alpha(check.alpha)} {guardrail_value(guardrail, check.value)} ({check.verdict})"
                    for check in row
                )
                for guardrail, row in zip(guardrails, rows, strict=True)
            )
            + ".",
        )


def _mark_decision(axes: Axes, pair: PairResult) -> None:
    label = f"chosen: {format_alpha(pair.decision)}" if pair.decision else "chosen: 0 (dpo)"
    axes.axvline(pair.decision, color="#000000", linewidth=1.6, linestyle="-.", zorder=2, label=label)


def _add_legend(figure: Figure) -> None:
    figure.legend(loc="outside upper left", ncols=2, borderaxespad=0.2, columnspacing=1.2)


def _decided(pair: PairResult) -> str:
    return f"Chosen: alpha {format_alpha(pair.decision)}" if pair.decision else "Chosen: dpo itself, alpha 0"


def _draw_alpha_axis(axes: Axes, alphas: Iterable[float], *, label: bool = True) -> None:
    """Draw scale, ticks and the lines of sft and dpo, on an axis that shows these alphas."""
    shown = [0.0, *alphas]
    low, high = min(shown), max(*shown, 0.1)
    axes.set_xscale("asinh", linear_width=_LINEAR_WIDTH)
    room = 0.03 * (_place(high) - _place(low))
    axes.set_xlim(*(float(np.sinh(at) * _LINEAR_WIDTH) for at in (_place(low) - room, _place(high) + room)))
    ticks = _ticks(low, high)
    axes.set_xticks(ticks, [_TICK_NAMES.get(tick, _tick_text(tick)) for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    for alpha in (-1, 0):
        if low <= alpha <= high:
            axes.axvline(alpha, color=GREY, linewidth=0.9, zorder=1)
    if label:
        axes.set_xlabel("alpha")


def _place(alpha: float) -> float:
    return float(np.arcsinh(alpha / _LINEAR_WIDTH))


def _tick_text(alpha: float) -> str:
    return format_alpha(alpha).replace("-", "\u2212")


def _ticks(low: float, high: float) -> Sequence[float]:
    """Take ticks in their order of importance, unless they would touch one that is taken."""
    span = _place(high) - _place(low)
    taken: list[float] = []
    for tick in _TICKS:
        near = any(abs(_place(tick) - _place(other)) < _SPACING * span for other in taken)
        if low <= tick <= high and not near:
            taken.append(tick)
    return sorted(taken)

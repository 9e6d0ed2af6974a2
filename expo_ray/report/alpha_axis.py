"""The axis of alpha: from sft at -1 through dpo at 0 to alphas of any size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from expo_ray.config import format_alpha
from expo_ray.report.svg import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# About linear between sft and small alphas, about logarithmic from 1 on.
_LINEAR_WIDTH = 0.3
_TICKS = (-1, 0, 1, 4, 16, 64, 256, 0.3, 2, 8, 32, 128, -0.5, 0.5, 0.1, 0.2, 0.05, 0.02, 0.01)
_NAMES = {-1: "\u22121\nsft", 0: "0\ndpo"}
_SPACING = 0.075


def draw_alpha_axis(axes: Axes, alphas: Iterable[float], *, label: bool = True) -> None:
    """Scale, ticks and the lines of sft and dpo, for an axis that shows these alphas."""
    shown = [0.0, *alphas]
    low, high = min(shown), max(*shown, 0.1)
    axes.set_xscale("asinh", linear_width=_LINEAR_WIDTH)
    room = 0.03 * (_place(high) - _place(low))
    axes.set_xlim(*(float(np.sinh(at) * _LINEAR_WIDTH) for at in (_place(low) - room, _place(high) + room)))
    ticks = _ticks(low, high)
    axes.set_xticks(
        ticks, [_NAMES.get(int(one) if one == int(one) else 2, _text(one)) for one in ticks], minor=False
    )
    axes.set_xticks([], minor=True)
    for alpha in (-1, 0):
        if low <= alpha <= high:
            axes.axvline(alpha, color=GREY, linewidth=0.9, zorder=1)
    if label:
        axes.set_xlabel("alpha")


def _place(alpha: float) -> float:
    return float(np.arcsinh(alpha / _LINEAR_WIDTH))


def _text(alpha: float) -> str:
    return format_alpha(alpha).replace("-", "\u2212")


def _ticks(low: float, high: float) -> Sequence[float]:
    """The most telling ticks that do not touch each other."""
    span = _place(high) - _place(low)
    taken: list[float] = []
    for tick in _TICKS:
        near = any(abs(_place(tick) - _place(other)) < _SPACING * span for other in taken)
        if low <= tick <= high and not near:
            taken.append(tick)
    return sorted(taken)

"""A page of benchmark results in the report's style: tables, and a forest plot of differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expo_ray.errors import JobError
from expo_ray.report.svg import BLUE, GREY, ORANGE, Drawing, figure_style, inline_svg
from expo_ray.text import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _ROW, _FRAME = 6.2, 0.32, 0.9


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForestRow:
    """Difference between a pair of models, or the mean over the pairs.

    Attributes:
        value: the difference; 0 is none.
        low: lower end of its interval.
        high: upper end.
        pooled: True for the mean over the other rows.
    """

    label: str
    value: float
    low: float
    high: float
    pooled: bool = False


@dataclass(frozen=True)
class Forest:
    """Differences with their intervals, one row each."""

    title: str
    unit: str
    rows: tuple[ForestRow, ...]


def benchmark_page(title: str, tables: Sequence[Table], forests: Sequence[Forest] = ()) -> str:
    """Draw the page; the same results give the same text.

    Raises:
        JobError: if what draws the page is not installed.
    """
    try:
        from expo_ray.report.report_page import template_environment

        template = template_environment().get_template("benchmark.html")
        drawings = [
            _drawn(forest, f"forest{number}") for number, forest in enumerate(forests, 1) if forest.rows
        ]
    except ImportError as error:
        raise JobError(
            f"the page is drawn with jinja2 and matplotlib, and {error.name} is not installed; pip install 'expo-ray[benchmark]'"
        ) from error
    return template.render(title=title, tables=tables, drawings=drawings)


def _drawn(forest: Forest, name: str) -> Drawing:
    from matplotlib.figure import Figure

    with figure_style(name):
        figure = Figure(figsize=(_WIDTH, _FRAME + _ROW * len(forest.rows)))
        _draw_rows(figure, forest)
        caption = f"Difference in {forest.unit} with its 95 % interval. Right of 0, the first model is better; an interval across 0 is inconclusive."
        described = "; ".join(
            f"{shown(row.label)}: {row.value:+.2f} [{row.low:+.2f}, {row.high:+.2f}]" for row in forest.rows
        )
        return Drawing(
            inline_svg(figure, name, forest.title, f"{forest.title}. {described}."), forest.title, caption
        )


def _draw_rows(figure: Figure, forest: Forest) -> None:
    axes = figure.add_subplot()
    for place, row in enumerate(forest.rows):
        axes.errorbar(
            [row.value],
            [place],
            xerr=[[max(row.value - row.low, 0)], [max(row.high - row.value, 0)]],
            fmt="D" if row.pooled else "o",
            color=ORANGE if row.pooled else BLUE,
            markersize=7 if row.pooled else 5,
            capsize=4,
        )
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(forest.rows)), [shown(row.label, 60) for row in forest.rows])
    axes.set_ylim(len(forest.rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(forest.unit)

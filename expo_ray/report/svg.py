"""Figures as SVG inside a page: text stays text, nothing points outside."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which every kind of colour vision tells apart and which are dark enough on white.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#C04A00", "#00785A", "#5c6670"

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#8a939c",
    "axes.grid": True,
    "axes.labelcolor": "#1c2127",
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 11,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
    # A name with two dollar signs is a name, not a formula.
    "text.parse_math": False,
    "xtick.color": "#3a424a",
    "ytick.color": "#3a424a",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        svg: one `<svg>` element, safe to put into a page as it is.
        title: what it shows.
        caption: how to read it.
    """

    svg: str
    title: str
    caption: str


@contextmanager
def figure_style(salt: str) -> Iterator[None]:
    """The look of all figures; the same figure with the same salt has the same bytes."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        yield


def inline_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The `<svg>` element of a figure.

    Args:
        figure: drawn within `figure_style`, and still inside it.
        name: prefix of every id, as ids have to be unique in the page.
        title: accessible name.
        description: what a reader without the picture should know.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib's rule is for `*`, which inside a page would be every element of it.
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<= id=")(?=[^"])', f"{name}-", text)
    text = re.sub(r'(?<="#)(?=[^"])|(?<=url\(#)', f"{name}-", text)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None, "matplotlib writes a viewBox"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size[0]} role="img" '
        f'aria-labelledby="{name}-title {name}-text">\n<title id="{name}-title">{html.escape(title)}</title>\n'
        f'<desc id="{name}-text">{html.escape(description)}</desc>'
    )
    return head + text[text.index(">") + 1 :]

"""Numbers, names and texts as the report prints them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from expo_ray.config import format_alpha
from expo_ray.config.guardrails import GUARDRAILS
from expo_ray.report.results import Example, Interval

# Characters. Three examples of three answers each for a hundred pairs stay below 20 MB.
_LONGEST_EXAMPLE = 20_000
_LONGEST_TEXT = 2000

_DIRECTION = re.compile(r"[\u202a-\u202e\u2066-\u2069]")

T = TypeVar("T")

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def alpha_text(alpha: float) -> str:
    """An alpha with a minus sign that typesetters use: `0.5`, `\u22121`."""
    return _minus(format_alpha(alpha))


def signed(value: float) -> str:
    """Three decimals and always a sign."""
    return _minus(f"{value:+.3f}")


def interval(estimate: Interval) -> str:
    """Mean and ends of its interval."""
    return f"{signed(estimate.mean)} [{signed(estimate.low)}, {signed(estimate.high)}]"


def share(value: float) -> str:
    """A share in percent, with one decimal."""
    return _minus(f"{value:.1%}")


def count(value: float) -> str:
    """A whole number with thin spaces between groups, other numbers with three digits that matter."""
    if not math.isfinite(value):
        return _minus(str(value))
    return f"{value:,.0f}".replace(",", "\u202f") if value == int(value) else _minus(f"{value:,.3g}")


def guardrail_value(name: str, value: float) -> str:
    """A guardrail's value in the unit of `GUARDRAILS`."""
    unit = GUARDRAILS[name].unit
    if unit == "share":
        return _minus(f"{value * 100:+.3g}%") if value else "0%"
    return f"\u00d7{value:.2f}" if unit == "ratio" else _minus(f"{value:.3g}")


def cost_name(key: str) -> str:
    """`gpu_hours` as `GPU hours`; bytes get their unit with the figure."""
    words = key.removeprefix("bytes_") + " bytes" if key.startswith("bytes_") else key
    text = words.replace("_", " ")
    return re.sub(
        r"^(cpu|gpu)\b", lambda match: match[0].upper(), text[0].upper() + text[1:], flags=re.IGNORECASE
    )


def cost_value(key: str, value: float) -> str:
    """The figure of a cost; bytes in the unit that suits their size."""
    if not (key.startswith("bytes") or key.endswith("bytes")) or not math.isfinite(value):
        return count(value)
    power = min(int(math.log(max(value, 1), 1000)), len(_UNITS) - 1)
    return f"{value / 1000**power:.3g} {_UNITS[power]}"


def visible(text: str) -> str:
    """`text` without control characters, which a page cannot show, and half surrogate pairs, which it cannot hold."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def bounded(value: T, longest: int = _LONGEST_TEXT) -> T:
    """`value`, the results of a run or a part of them, with every text visible and cut, so that a page of it can be opened."""
    shorter: Any = value
    if isinstance(value, str):
        shorter = visible(cut(value, longest))
        if longest != _LONGEST_EXAMPLE:  # those stand in boxes that no mark of direction leaves
            shorter = _DIRECTION.sub("\ufffd", shorter)
    elif is_dataclass(value) and not isinstance(value, type):
        most = _LONGEST_EXAMPLE if isinstance(value, Example) else longest
        shorter = replace(
            value, **{field.name: bounded(getattr(value, field.name), most) for field in fields(value)}
        )
    elif isinstance(value, Mapping):
        shorter = {bounded(key): bounded(inner, longest) for key, inner in value.items()}
    elif isinstance(value, tuple):
        shorter = tuple(bounded(inner, longest) for inner in value)
    return cast("T", shorter)


def cut(text: str, longest: int) -> str:
    """The beginning of `text`, and how much there is of it."""
    return text if len(text) <= longest else f"{text[:longest]}\u2026 (cut here, of {len(text):,} characters)"


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")

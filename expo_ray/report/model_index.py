"""What was measured of a published model, for its card: the Hub's `model-index`, and a section that people read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from expo_ray.config import format_alpha
from expo_ray.report.formatting import interval, share, signed
from expo_ray.report.markdown import plain, table
from expo_ray.report.results import Interval, Measurement, PairResult
from expo_ray.text import shown

_HALVES = {"confirm": "Prompts that alpha was not chosen on", "choose": "Prompts that alpha was chosen on"}


def model_index(result: PairResult, alpha: float) -> list[dict[str, Any]]:
    """The `model-index` of the model at `alpha`; empty if nothing was measured there.

    Format: https://github.com/huggingface/hub-docs/blob/main/modelcard.md?plain=1. The confirming half comes first, as the one to
    believe. Intervals are in a metric's `args`, so that its value stays a number.
    """
    results = [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {
                "type": "prompts",
                "name": name,
                "split": half,
                "args": {"num_prompts": rows[0].prompts},
            },
            "metrics": [metric for one in rows for metric in _metrics(one)],
        }
        for half, name, rows in _rows(result, alpha)
    ]
    return (
        [{"name": f"{shown(result.name)}, alpha {format_alpha(alpha)}", "results": results}]
        if results
        else []
    )


def evaluation_section(result: PairResult, alpha: float) -> list[str]:
    """The card's section about the evaluation, as Markdown; empty if nothing was measured at `alpha`."""
    halves = list(_rows(result, alpha))
    if not halves:
        return []
    head = (
        "prompts",
        "number",
        "reward model",
        "reward",
        "gain over dpo",
        "length-controlled",
        "win rate over dpo",
    )
    lines = [
        (
            name,
            str(one.prompts),
            plain(one.reward_model),
            signed(one.reward.mean),
            interval(one.gain),
            interval(one.controlled_gain) if one.controlled_gain else "-",
            share(one.win_rate),
        )
        for _, name, rows in halves
        for one in rows
    ]
    return [
        "## Evaluation\n",
        f"{_decision(result, alpha)} Gains are mean differences in reward to dpo on the same prompts and seeds; brackets hold their "
        "confidence interval over prompts.\n",
        table(head, lines),
        *(f"> **Look at this first:** {plain(warning)}\n" for warning in result.warnings),
    ]


def _rows(result: PairResult, alpha: float) -> Iterator[tuple[str, str, list[Measurement]]]:
    for half, name in _HALVES.items():
        measured = result.chosen if alpha == result.decision else result.measured
        rows = [one for one in measured if (one.alpha, one.half) == (alpha, half)]
        if rows:
            yield half, name, rows


def _metrics(one: Measurement) -> Iterator[dict[str, Any]]:
    for kind, name, value in (
        ("reward", "Mean reward", one.reward),
        ("reward_gain", "Gain in reward over dpo", one.gain),
        ("length_controlled_reward_gain", "Gain in reward over dpo, length-controlled", one.controlled_gain),
        ("win_rate", "Win rate over dpo", one.win_rate),
    ):
        mean = value.mean if isinstance(value, Interval) else value
        if mean is None or not math.isfinite(mean):
            continue
        metric: dict[str, Any] = {"type": kind, "value": mean, "name": f"{name}, {shown(one.reward_model)}"}
        if isinstance(value, Interval) and math.isfinite(value.low) and math.isfinite(value.high):
            metric["args"] = {"low": value.low, "high": value.high}
        yield metric


def _decision(result: PairResult, alpha: float) -> str:
    if alpha == result.decision:
        return plain(
            " ".join([f"{result.reason}.", *([f"{result.groups.reason}."] if result.groups else [])])
        )
    why = result.rejected.get(alpha, "")
    other = "dpo itself was kept" if result.decision == 0 else f"alpha {format_alpha(result.decision)} was"
    return (
        f"**This alpha was not chosen{', ' if result.decision == 0 else '; '}{other}.** {plain(why)}".rstrip()
    )

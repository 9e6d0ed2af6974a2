"""The model card of a published model, in the Hub's conventions: from its manifest, and from the results of its pair."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from expo_ray.config import format_alpha
from expo_ray.report.formatting import interval, share, signed
from expo_ray.report.markdown import code, plain, table
from expo_ray.report.results import Interval, Measurement, PairResult
from expo_ray.text import first_few, shown

_HUB = re.compile(r"hf://([\w.-]{1,96}/[\w.-]{1,96})(?=[/@]|$)", re.ASCII)
_TENSORS_SHOWN = 10


def model_card(manifest: Mapping[str, Any], result: PairResult | None = None) -> str:
    """The text of a model's `README.md`.

    Args:
        manifest: the content of `expo.json`, which describes it.
        result: of its pair; None if it was not searched.
    """
    alpha, arithmetic, parents = manifest["alpha"], manifest["arithmetic"], manifest["parents"]
    settings = [(code(k), code(v)) for k, v in arithmetic.items() if k != "formula" and v not in (None, {})]
    shards = [(plain(s["file"]), f"{s['size']:,}", code(s["sha256"])) for s in manifest["shards"]]
    sections = [
        _front_matter(manifest, _model_index(result, alpha) if result else []),
        f"# {plain(manifest['pair'])}, extrapolated by alpha = {format_alpha(alpha)}\n",
        "Made without training from two checkpoints by [ExPO](https://arxiv.org/abs/2404.16792): "
        f"`W = W_dpo + alpha (W_dpo - W_sft)` with alpha = {format_alpha(alpha)}.\n",
        *(f"> **Look at this first:** {plain(warning)}\n" for warning in manifest["warnings"]),
        *(_evaluation_section(result, alpha) if result else []),
        "## Parents\n",
        table(("", "folder", "revision"), [(plain(s), code(p["uri"]), code(p["revision"]) if p["revision"] else "-") for s, p in parents.items()]),
        "## Arithmetic\n",
        f"{plain(arithmetic['formula'])}\n",
        table(("option", "value"), settings),
        "## What changed\n",
        _changes(manifest["statistics"]),
        "## Files\n",
        table(("file", "bytes", "sha256"), shards),
        *_not_carried_over(manifest.get("not_carried_over", ())),
        f"Plan {code(manifest['plan'])}, written by expo-ray {plain(manifest['expo_ray'])}. `expo.json` holds the statistics of "
        "every tensor, and size and ETag of every file of both parents; `expo-ray verify` checks this folder against it.\n",
    ]  # fmt: skip
    return "\n".join(sections)


def _front_matter(manifest: Mapping[str, Any], index: Sequence[Mapping[str, Any]]) -> str:
    """The Hub's metadata; parents that are not on the Hub cannot be named there."""
    adapter = manifest["arithmetic"]["adapter"]
    sides = ("sft",) if adapter == "scale" else ("dpo", "sft")
    named = (_HUB.match(manifest["parents"][side]["uri"]) for side in sides)
    base = [match[1] for match in named if match]
    data: dict[str, Any] = {"library_name": "peft" if adapter == "scale" else "transformers"}
    if base:
        data |= {"base_model": base, "base_model_relation": "adapter" if adapter == "scale" else "merge"}
    data["tags"] = ["merge", "expo", "model-extrapolation", "expo-ray"]
    if index:
        data["model-index"] = index
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n"


def _not_carried_over(keys: Sequence[str]) -> Iterator[str]:
    if keys:
        names = [code(key) for key in keys]
        yield f"Files of the parents that nothing in the model names, and that were not carried over: {first_few(names, 20)}.\n"


def _changes(statistics: Mapping[str, Any]) -> str:
    if not statistics["elements"]:
        return "No weight was recomputed: the adapter's scale carries alpha exactly.\n"
    tensors = sorted(
        statistics["tensors"].items(), key=lambda item: -(item[1]["rms_delta"] / (item[1]["rms_weight"] or 1))
    )
    rows = [
        ("**all**", *_row(statistics)),
        *((code(name), *_row(tensor)) for name, tensor in tensors[:_TENSORS_SHOWN]),
    ]
    head = ("tensor", "RMS weight", "RMS delta", "changed", "effective alpha")
    return table(head, rows) + (
        f"\nThe {len(rows) - 1} tensors with the largest relative delta are listed.\n"
    )


def _row(statistics: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{statistics['rms_weight']:.3g}",
        f"{statistics['rms_delta']:.3g}",
        f"{statistics['changed_share']:.1%}",
        f"{statistics['effective_alpha']:.3f}",
    )


def _model_index(result: PairResult, alpha: float) -> list[dict[str, Any]]:
    """The `model-index` of the model at `alpha`; empty if no untouched prompts were asked.

    Format: https://github.com/huggingface/hub-docs/blob/main/modelcard.md?plain=1. Intervals are in a metric's `args`, so that its value
    stays a number.
    """
    rows = _confirmed(result, alpha)
    if not rows:
        return []
    dataset = {
        "type": "prompts",
        "name": "Prompts that alpha was not chosen on",
        "split": "confirm",
        "args": {"num_prompts": rows[0].prompts},
    }
    measured = {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": dataset,
        "metrics": [metric for measurement in rows for metric in _metrics(measurement)],
    }
    return [{"name": f"{shown(result.name)}, alpha {format_alpha(alpha)}", "results": [measured]}]


def _evaluation_section(result: PairResult, alpha: float) -> list[str]:
    """The card's section about the evaluation, as Markdown; empty if nothing was measured at `alpha`."""
    if not any(measured.alpha == alpha for measured in result.measured):
        return []
    head = (
        "prompts",
        "reward model",
        "reward",
        "gain over dpo",
        "length-controlled",
        "win rate over dpo",
    )
    lines = [
        (
            str(measurement.prompts),
            plain(measurement.reward_model),
            signed(measurement.reward.mean),
            interval(measurement.gain),
            interval(measurement.controlled_gain) if measurement.controlled_gain else "-",
            share(measurement.win_rate),
        )
        for measurement in _confirmed(result, alpha)
    ]
    return [
        "## Evaluation\n",
        f"{_decision(result, alpha)}\n",
        *(
            (
                "On prompts that alpha was not chosen on. Gains are mean differences in reward to dpo on the same prompts and seeds; brackets hold "
                "their confidence interval over prompts. A reward model is not a person.\n",
                table(head, lines),
            )
            if lines
            else (
                "No gain is listed: this alpha was not asked any prompts that it was not chosen on, and those it was chosen on flatter it.\n",
            )
        ),
        *(f"> **Look at this first:** {plain(warning)}\n" for warning in result.warnings),
    ]


def _confirmed(result: PairResult, alpha: float) -> list[Measurement]:
    """Measurements on untouched prompts, by each reward model: those that alpha was chosen on are no evidence, as selection flatters them."""
    return [each for each in result.measured if (each.alpha, each.half) == (alpha, "confirm")]


def _metrics(measurement: Measurement) -> Iterator[dict[str, Any]]:
    for kind, name, value in (
        ("reward", "Mean reward", measurement.reward),
        ("reward_gain", "Gain in reward over dpo", measurement.gain),
        (
            "length_controlled_reward_gain",
            "Gain in reward over dpo, length-controlled",
            measurement.controlled_gain,
        ),
        ("win_rate", "Win rate over dpo", measurement.win_rate),
    ):
        mean = value.mean if isinstance(value, Interval) else value
        if mean is None or not math.isfinite(mean):
            continue
        metric: dict[str, Any] = {
            "type": kind,
            "value": mean,
            "name": f"{name}, {shown(measurement.reward_model)}",
        }
        if isinstance(value, Interval) and math.isfinite(value.low) and math.isfinite(value.high):
            metric["args"] = {"low": value.low, "high": value.high}
        yield metric


def _decision(result: PairResult, alpha: float) -> str:
    if alpha == result.decision:
        return plain(f"{result.reason}.")
    why = result.rejected.get(alpha, "")
    other = "dpo itself was kept" if result.decision == 0 else f"alpha {format_alpha(result.decision)} was"
    return (
        f"**This alpha was not chosen{', ' if result.decision == 0 else '; '}{other}.** {plain(why)}".rstrip()
    )

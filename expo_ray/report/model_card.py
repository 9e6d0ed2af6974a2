"""The model card of a published model, in the Hub's conventions: from its manifest, and from what was measured of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from expo_ray.config import format_alpha
from expo_ray.report.markdown import code, plain, table
from expo_ray.report.model_index import evaluation_section, model_index
from expo_ray.report.results import PairResult
from expo_ray.text import first_few

_HUB = re.compile(r"hf://([\w.-]{1,96}/[\w.-]{1,96})(?=[/@]|$)", re.ASCII)
_TENSORS_SHOWN = 10


def model_card(manifest: Mapping[str, Any], result: PairResult | None = None) -> str:
    """`README.md` of a model.

    Args:
        manifest: the content of `expo.json`, which describes it.
        result: what was measured of its pair; None if nothing was.
    """
    alpha, arithmetic, parents = manifest["alpha"], manifest["arithmetic"], manifest["parents"]
    settings = [(code(k), code(v)) for k, v in arithmetic.items() if k != "formula" and v not in (None, {})]
    shards = [(plain(s["file"]), f"{s['size']:,}", code(s["sha256"])) for s in manifest["shards"]]
    sections = [
        _front_matter(manifest, model_index(result, alpha) if result else []),
        f"# {plain(manifest['pair'])}, extrapolated by alpha = {format_alpha(alpha)}\n",
        "Made without training from two checkpoints by [ExPO](https://arxiv.org/abs/2404.16792): "
        f"`W = W_dpo + alpha (W_dpo - W_sft)` with alpha = {format_alpha(alpha)}.\n",
        *(f"> **Look at this first:** {plain(warning)}\n" for warning in manifest["warnings"]),
        *(evaluation_section(result, alpha) if result else []),
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
        *((code(name), *_row(one)) for name, one in tensors[:_TENSORS_SHOWN]),
    ]
    head = ("tensor", "RMS weight", "RMS delta", "changed", "effective alpha")
    return table(head, rows) + (
        f"\nThe {len(rows) - 1} tensors with the largest relative delta are listed.\n"
    )


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{one['rms_weight']:.3g}",
        f"{one['rms_delta']:.3g}",
        f"{one['changed_share']:.1%}",
        f"{one['effective_alpha']:.3f}",
    )

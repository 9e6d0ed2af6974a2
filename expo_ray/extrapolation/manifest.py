"""The manifest `expo.json` of a published model: what is written into it, and how it is read.

It is read from anywhere, so it is checked field by field before anything trusts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from expo_ray import __version__
from expo_ray.arithmetic.rule import ROUNDINGS
from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.config import format_alpha
from expo_ray.config.fields import (
    NAME,
    AdapterPolicy,
    Multiplier,
    OutputDtype,
    Pattern,
    RoundingName,
    VocabPolicy,
    check_alpha,
)
from expo_ray.errors import CheckpointError, ExpoError, StorageError
from expo_ray.extrapolation.integrity import NOTHING
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.receipt import Receipt
from expo_ray.storage.uri import check_key
from expo_ray.text import first_few
from expo_ray.untrusted import TOKENIZER_BYTES, Foreign, is_ambiguous, parse_json_object, validated

MANIFEST = "expo.json"
# It holds a few lines for each tensor.
MANIFEST_BYTES = TOKENIZER_BYTES
FORMAT = 1
REMEDY = "run its job again with --overwrite"

EFFECTIVE_ALPHA_TOLERANCE = 0.05
# RMS(delta)/RMS(dpo) of DPO and RLHF runs lies around 1e-3 (2.6e-3 on the example pair); supervised fine-tuning of a base
# model moves its weights ten times as far, and extrapolating that is a known failure (arXiv 2404.16792, section 4.3).
LARGEST_ALIGNMENT_DELTA = 3e-2


def manifest_of(
    plan: PairPlan, alpha: float, receipts: Sequence[Receipt], guards: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """The manifest of the model of `plan` at `alpha`, but for `files`, the digests of what lies beside the shards.

    Args:
        receipts: of every shard, in their order.
        guards: see `integrity.check_reading`.
    """
    options = plan.options
    statistics = statistics_by_tensor(receipts)
    return {
        "format": FORMAT,
        "expo_ray": __version__,
        "plan": plan.plan_id(alpha),
        "pair": plan.name,
        "alpha": alpha,
        "arithmetic": {
            "formula": ROUNDINGS[options.rounding].formula,
            "rounding": options.rounding,
            "seed": options.seed,
            "dtype": options.dtype,
            "vocab": options.vocab,
            "adapter": options.adapter if plan.dpo.adapter else None,
            "multipliers": dict(options.multipliers),
            "shard_size": options.shard_size,
        },
        "parents": {
            side: _parent(checkpoint, guards.get(side, {}))
            for side, checkpoint in (("sft", plan.sft), ("dpo", plan.dpo))
        },
        "shards": [
            {"file": receipt.file, "size": receipt.size, "sha256": receipt.sha256} for receipt in receipts
        ],
        "warnings": [*_warnings(plan, alpha, statistics), *_unguarded(guards)],
        "not_carried_over": list(plan.left_behind),
        "statistics": _described(sum(statistics.values(), TensorStatistics()))
        | {"tensors": {name: _described(sums) for name, sums in statistics.items()}},
    }


def statistics_by_tensor(receipts: Sequence[Receipt]) -> dict[str, TensorStatistics]:
    """Statistics of every tensor that was extrapolated, by name; no tensor lies in two shards."""
    return {name: sums for receipt in receipts for name, sums in receipt.statistics.items()}


def _warnings(plan: PairPlan, alpha: float, statistics: Mapping[str, TensorStatistics]) -> Iterator[str]:
    """Warn of an effective alpha that is not the one asked for, and of a delta too large for alignment."""
    multipliers = {tensor.name: tensor.multiplier for shard in plan.shards for tensor in shard.tensors}
    # Of each tensor, what `moved_delta` would be without rounding.
    wanted = {name: alpha * multipliers[name] * sums.delta_square for name, sums in statistics.items()}
    total = sum(statistics.values(), TensorStatistics())
    if _is_off(total.moved_delta, sum(wanted.values())):
        nominal = sum(wanted.values()) / total.delta_square
        off = [name for name, sums in statistics.items() if _is_off(sums.moved_delta, wanted[name])]
        yield (
            f"the effective alpha is {total.effective_alpha:.3f} where {nominal:.3g} was asked for: "
            f"{ROUNDINGS[plan.options.rounding].loss} (most in {first_few(off, 3)})"
        )
    if total.relative_delta > LARGEST_ALIGNMENT_DELTA:
        yield (
            f"dpo differs from sft by {total.relative_delta:.1%} of the weights' RMS, more than alignment training does; if sft is "
            f"a base model and dpo its fine-tuned one, alpha {format_alpha(alpha)} will likely break it"
        )


def _is_off(moved: float, wanted: float) -> bool:
    return wanted != 0 and abs(moved / wanted - 1) > EFFECTIVE_ALPHA_TOLERANCE


def _unguarded(guards: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Warn of files that nothing guarded on their way."""
    files = [
        f"{side}: {key}" for side, keys in guards.items() for key, guard in keys.items() if guard == NOTHING
    ]
    if files:
        yield (
            f"{len(files)} file(s) of the parents were read over plain http from a store that keeps no checksum of the whole file, so "
            f"that a flipped bit would not have been noticed: {first_few(files, 3)}; use https, upload them with "
            "`--checksum-algorithm CRC64NVME`, or set EXPO_RAY_READ_TWICE=1"
        )


def _parent(checkpoint: Checkpoint, guards: Mapping[str, str]) -> dict[str, Any]:
    return {
        "uri": checkpoint.uri,
        "revision": checkpoint.revision,
        "files": {
            key: {"size": info.size, "etag": info.etag} | ({"guard": guards[key]} if key in guards else {})
            for key, info in sorted(checkpoint.files.items())
        },
    }


def _described(sums: TensorStatistics) -> dict[str, float | int]:
    rms_weight = (sums.dpo_square / sums.elements) ** 0.5 if sums.elements else 0.0
    return {
        "elements": sums.elements,
        "changed_share": float(f"{sums.changed_share:.6g}"),
        "rms_weight": float(f"{rms_weight:.6g}"),
        "rms_delta": float(f"{rms_weight * sums.relative_delta:.6g}"),
        "effective_alpha": float(f"{sums.effective_alpha:.6g}"),
    }


def _check_key(key: str) -> str:
    try:
        return check_key(key, "it")
    except StorageError as error:
        raise ValueError(str(error)) from error


_Key = Annotated[str, AfterValidator(_check_key)]
_Size = Annotated[int, Field(ge=0, lt=2**63)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Sum = Annotated[float, Field(allow_inf_nan=True)]


def _refuse_endless(pattern: str) -> str:
    if is_ambiguous(pattern):
        raise ValueError("the pattern repeats a repetition, so that a search may never end")
    return pattern


class _File(Foreign):
    size: _Size
    sha256: _Sha256


class _Shard(_File):
    file: _Key


class _Arithmetic(Foreign):
    formula: str
    rounding: RoundingName
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    dtype: OutputDtype
    vocab: VocabPolicy
    adapter: AdapterPolicy | None = None
    multipliers: dict[Annotated[Pattern, AfterValidator(_refuse_endless)], Multiplier]
    shard_size: Annotated[int, Field(ge=1, lt=2**63)]


class _ParentFile(Foreign):
    size: _Size
    etag: str
    guard: str = ""


class _Parent(Foreign):
    uri: str
    revision: str
    files: dict[str, _ParentFile]


class _Parents(Foreign):
    sft: _Parent
    dpo: _Parent


class _Tensor(Foreign):
    elements: _Size
    changed_share: _Sum
    rms_weight: _Sum
    rms_delta: _Sum
    effective_alpha: _Sum


class _Statistics(_Tensor):
    tensors: dict[str, _Tensor]


class _Manifest(Foreign):
    format: Literal[1]
    expo_ray: str
    plan: Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]
    pair: Annotated[str, Field(pattern=NAME)]
    alpha: Annotated[float, AfterValidator(check_alpha)]
    arithmetic: _Arithmetic
    parents: _Parents
    shards: tuple[_Shard, ...]
    files: dict[_Key, _File]
    warnings: tuple[str, ...]
    statistics: _Statistics

    @field_validator("shards", "warnings", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


def parse_manifest(
    data: bytes, source: str, *, error: type[ExpoError] = CheckpointError, remedy: str = REMEDY
) -> dict[str, Any]:
    """Parse a manifest that this version or an earlier one wrote.

    Args:
        source: names it in errors.
        error: the class of what is raised.
        remedy: ends the message.

    Raises:
        ExpoError: of the class `error`, if it is damaged or of another format.
    """
    manifest = parse_json_object(data, source, most_bytes=MANIFEST_BYTES, error=error, remedy=remedy)
    validated(_Manifest, manifest, f"{source} is not a manifest of this format", error=error, remedy=remedy)
    return manifest

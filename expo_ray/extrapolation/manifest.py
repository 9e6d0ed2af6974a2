"""The manifest `expo.json` of a published model: read from anywhere, so checked field by field before anything trusts it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

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
from expo_ray.storage.uri import check_key
from expo_ray.untrusted import TOKENIZER_BYTES, Foreign, is_ambiguous, parse_json_object, validated

# It holds a line for each tensor.
MANIFEST_BYTES = TOKENIZER_BYTES
FORMAT = 1
REMEDY = "run its job again with --overwrite"


def _plain_key(key: str) -> str:
    try:
        return check_key(key, "it")
    except StorageError as error:
        raise ValueError(str(error)) from error


_Key = Annotated[str, AfterValidator(_plain_key)]
_Size = Annotated[int, Field(ge=0, lt=2**63)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Sum = Annotated[float, Field(allow_inf_nan=True)]


def _ends(pattern: str) -> str:
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
    multipliers: dict[Annotated[Pattern, AfterValidator(_ends)], Multiplier]
    shard_size: Annotated[int, Field(ge=1, lt=2**63)]


class _ParentFile(Foreign):
    size: _Size
    etag: str


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

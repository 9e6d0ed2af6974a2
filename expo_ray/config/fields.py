"""The types of single values in a job file, and what every section of it is."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from expo_ray.errors import JobError
from expo_ray.text import redact, shown
from expo_ray.untrusted import compile_pattern

RoundingName = Literal["nearest", "stochastic", "reference"]
OutputDtype = Literal["keep", "bf16", "fp16", "fp32"]
VocabPolicy = Literal["refuse", "by-token", "keep-dpo"]
AdapterPolicy = Literal["scale", "merge"]
Device = Literal["auto", "cpu", "cuda"]
RewardBackend = Literal["auto", "vllm", "transformers"]
Role = Literal["choose", "joint", "guard", "confirm"]
WeightDtype = Literal["auto", "bf16", "fp16", "fp32"]
# Options that only the command line has.
ResponseFormat = Literal["jsonl", "alpaca-eval", "mt-bench"]
JudgeProtocol = Literal["logprobs", "verdict"]
LengthControlKind = Literal["rejudge", "none", "official"]
DuplicatePolicy = Literal["refuse", "last"]

READ_ONLY = "the Hub is only read from here; write to a local folder or S3, from where `expo-ray push` sends a finished model"

_LARGEST_SIZE = 2**63
_UNITS = {"": 1, "B": 1} | {
    unit: base**power
    for power, letter in enumerate("KMGT", start=1)
    for unit, base in ((letter + "B", 1000), (letter, 1000), (letter + "IB", 1024))
}


def parse_bytes(text: object) -> int:
    """`5GB` -> 5,000,000,000; `512MiB` -> 536,870,912; a number is taken as bytes."""
    given = shown(repr(text), 60)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if isinstance(text, bool) or match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{given} is not a size; write it like 5GB or 512MiB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if not size < _LARGEST_SIZE:
        raise ValueError(f"{given} is more than any file can hold; write a size like 5GB")
    if size < 1:
        raise ValueError(f"{given} is below one byte; write a size like 5GB")
    return int(size)


def check_alpha(alpha: float) -> float:
    """Any finite float from -1 up: -1 is sft, between -1 and 0 interpolates, 0 is dpo, above 0 extrapolates."""
    if not math.isfinite(alpha) or alpha < -1:
        raise ValueError(
            f"alpha is {alpha}; it must be a finite number of at least -1 (-1 gives sft, 0 gives dpo)"
        )
    return alpha + 0.0  # -0.0 becomes 0.0, so that both name one folder


def format_alpha(alpha: float) -> str:
    """The shortest text that reads back as `alpha`, as in the folder name `alpha=0.5`."""
    return repr(float(alpha)).removesuffix(".0")


def check_output(uri: str) -> str:
    """`uri` itself, unless it can only be read."""
    if uri.lower().startswith("hf://"):
        raise ValueError(f"{uri}: {READ_ONLY}")
    return uri


def check_pattern(pattern: str) -> str:
    """`pattern` itself, if it is a regular expression."""
    try:
        compile_pattern(pattern)
    except JobError as error:
        raise ValueError(str(error)) from error
    return pattern


def check_alphas(alphas: tuple[float, ...]) -> tuple[float, ...]:
    """`alphas` themselves, if each is listed once."""
    twice = sorted(alpha for alpha, count in Counter(alphas).items() if count > 1)
    if twice:
        raise ValueError(f"alpha {', '.join(map(format_alpha, twice))} is listed twice; list each alpha once")
    return alphas


Alpha = Annotated[float, AfterValidator(check_alpha)]
Alphas = Annotated[
    tuple[Alpha, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, int | float | str) else value),
    AfterValidator(check_alphas),
]
Multiplier = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Pattern = Annotated[str, AfterValidator(check_pattern)]
ByteSize = Annotated[
    int, BeforeValidator(parse_bytes), WithJsonSchema({"type": ["string", "integer"], "examples": ["5GB"]})
]


def check_repo_id(repo_id: str) -> str:
    """`repo_id` itself, if the Hub takes it as the name of a model repository.

    Raises:
        ValueError: if it does not.
    """
    part = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
    if (
        not re.fullmatch(f"{part}/{part}", repo_id)
        or len(repo_id) > 96
        or re.search(r"--|\.\.|\.git$", repo_id)
    ):
        raise ValueError(
            f"{repo_id!r} cannot be a model repository of the Hub; write ORG/NAME, at most 96 letters, digits, `.`, `_` and `-`, "
            "without `--`, `..` or `.git` at the end"
        )
    return repo_id


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def named_after(data: Any, field: str) -> Any:
    """`data` with a `name` made from the last part of the path in `field`, unless it has one."""
    if not isinstance(data, dict) or not isinstance(data.get(field), str) or data.get("name") is not None:
        return data
    # The name makes paths: no signature or password may end up in it.
    last = redact(data[field]).rstrip("/").rpartition("/")[2].partition("@")[0]
    return data | {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip(".-_") or field}


class Frozen(BaseModel):
    """A section of a job file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

"""The job file: frozen, typed, refusing what it does not know.

The text under each field is what `--help`, the JSON schema and the README show.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from expo_ray.errors import JobError, Problems

Rounding = Literal["nearest", "stochastic", "reference"]
OutputDtype = Literal["keep", "bf16", "fp16", "fp32"]
VocabPolicy = Literal["refuse", "by-token", "keep-dpo"]
AdapterPolicy = Literal["scale", "merge"]
Device = Literal["auto", "cpu", "cuda"]

_UNITS = {"": 1, "B": 1} | {
    unit: base**power
    for power, letter in enumerate("KMGT", start=1)
    for unit, base in ((letter + "B", 1000), (letter, 1000), (letter + "IB", 1024))
}


def parse_bytes(text: object) -> int:
    """`5GB` -> 5,000,000,000; `512MiB` -> 536,870,912; a number is taken as bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if isinstance(text, bool) or match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 5GB or 512MiB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ValueError(f"{text!r} is below one byte; write a size like 5GB")
    return size


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


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
    return pattern


def _check_alphas(alphas: tuple[float, ...]) -> tuple[float, ...]:
    twice = sorted({alpha for alpha in alphas if alphas.count(alpha) > 1})
    if twice:
        raise ValueError(f"alpha {', '.join(map(format_alpha, twice))} is listed twice; list each alpha once")
    return alphas


Alpha = Annotated[float, AfterValidator(check_alpha)]
Alphas = Annotated[
    tuple[Alpha, ...],
    BeforeValidator(lambda found: (found,) if isinstance(found, int | float | str) else found),
    AfterValidator(_check_alphas),
]
Multiplier = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
ByteSize = Annotated[
    int, BeforeValidator(parse_bytes), WithJsonSchema({"type": ["string", "integer"], "examples": ["5GB"]})
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PairOptions(_Frozen):
    """How a pair is extrapolated. Set under `defaults` for all pairs, or in one pair."""

    alphas: Alphas = ()
    """Steps past dpo, each a finite number of at least -1; every alpha gives one model."""

    rounding: Rounding = "stochastic"
    """How a weight is rounded to 16 bits. `stochastic` keeps small alphas alive, `nearest` loses them, `reference` repeats
    the paper's script bit for bit. fp32 outputs are rounded to nearest."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of stochastic rounding."""

    dtype: OutputDtype = "keep"
    """Data type of the written weights; `keep` is dpo's, tensor by tensor."""

    vocab: VocabPolicy = "refuse"
    """What to do when the embeddings of dpo and sft have different numbers of rows: `by-token` matches rows through both
    tokenizers, `keep-dpo` matches them by position and keeps dpo's rows past sft's last."""

    adapter: AdapterPolicy = "scale"
    """When dpo is a LoRA adapter on sft: `scale` writes the adapter with its scale times (1 + alpha), `merge` writes a
    whole model."""

    multipliers: Mapping[Pattern, Multiplier] = Field(default_factory=dict)
    """Regular expressions on tensor names and what alpha is multiplied by there; the first that is found in the name
    counts. 0 freezes a tensor at dpo."""

    shard_size: ByteSize = 5_000_000_000
    """Largest file of a written model, such as 5GB."""

    allow_pickle: bool = False
    """Read `pytorch_model*.bin` where a parent has no safetensors (restricted unpickling, no code is run)."""


class Pair(PairOptions):
    """One SFT model and the DPO/RLHF model trained from it."""

    sft: Annotated[str, Field(min_length=1)]
    """Folder of the SFT model: a path, `s3://bucket/prefix` or `hf://org/name@revision`."""

    dpo: Annotated[str, Field(min_length=1)]
    """Folder of the DPO/RLHF model, or of a LoRA adapter trained on sft."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = ""
    """Name of the pair in paths and reports; the last part of `dpo` unless given."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_dpo(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("dpo"), str) and data.get("name") is None:
            last = data["dpo"].rstrip("/").rpartition("/")[2].partition("@")[0]
            return data | {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip(".-_") or "pair"}
        return data


class Job(_Frozen):
    """A job file: where to write, and which pairs to extrapolate."""

    output: Annotated[str, Field(min_length=1)]
    """Root of everything written: a path or `s3://bucket/prefix`. Models land in `pairs/<pair>/alpha=<alpha>/`."""

    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    """The pairs, each with at least `sft` and `dpo`."""

    defaults: PairOptions = PairOptions()
    """Options of every pair that does not set them itself."""

    device: Device = "auto"
    """Where the arithmetic runs; the bytes are the same. `auto` takes a GPU where the task has one."""

    @model_validator(mode="before")
    @classmethod
    def _spread_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("defaults"), dict):
            return data
        pairs = data.get("pairs")
        if not isinstance(pairs, list):
            return data
        known = {key: value for key, value in data["defaults"].items() if key in PairOptions.model_fields}
        return data | {"pairs": [known | pair if isinstance(pair, dict) else pair for pair in pairs]}

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [pair.name for pair in self.pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"pairs: {', '.join(twice)} is used twice; give each pair its own `name`")
        return self


def load_job(path: str | Path) -> Job:
    """Read and check a job file.

    Raises:
        JobError: if the file cannot be read or is not YAML.
        Problems: with everything that is wrong in it.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read ({error}); give the path of a YAML job file") from error
    except yaml.YAMLError as error:
        raise JobError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise JobError(
            f"{path}: holds {type(data).__name__}; a job file is a mapping with `output` and `pairs`"
        )
    return parse_job(data, str(path))


def parse_job(data: Mapping[str, Any], source: str) -> Job:
    """Check a job given as plain data; `source` stands before each problem."""
    try:
        return Job.model_validate(dict(data))
    except ValidationError as error:
        raise Problems([JobError(f"{source}: {text}") for text in dict.fromkeys(_explain(error))]) from error


def parse_pair(data: Mapping[str, Any], source: str) -> Pair:
    """Check one pair given as plain data; `source` stands before each problem."""
    try:
        return Pair.model_validate(dict(data))
    except ValidationError as error:
        raise Problems([JobError(f"{source}: {text}") for text in dict.fromkeys(_explain(error))]) from error


def job_schema() -> dict[str, Any]:
    """JSON schema of the job file, for editors."""
    return Job.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "expo-ray job",
    }


def _explain(error: ValidationError) -> Iterator[str]:
    problems = error.errors()
    in_defaults = {
        (problem["loc"][1:], problem["msg"]) for problem in problems if problem["loc"][:1] == ("defaults",)
    }
    in_pairs = any(problem["loc"][:1] == ("pairs",) and len(problem["loc"]) > 1 for problem in problems)
    for problem in problems:
        if problem["loc"][:1] == ("pairs",) and (problem["loc"][2:], problem["msg"]) in in_defaults:
            continue  # inherited; told once, where it stands
        if problem["loc"] == ("pairs",) and problem["type"] == "too_short" and in_pairs:
            continue  # pydantic counts the valid pairs only
        place = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]
        ).lstrip(".")
        if problem["type"] == "extra_forbidden":
            yield _explain_unknown(place, problem["loc"])
        elif problem["type"] == "missing":
            yield f"{place} is missing; {_field_text(problem['loc'])}"
        else:
            text = problem["msg"].removeprefix("Value error, ")
            found = (
                problem["input"] if isinstance(problem["input"], str | int | float | bool | None) else None
            )
            shown = f" (found {found!r})" if found is not None and repr(found) not in text else ""
            yield f"{place}: {text}{shown}" if place else text


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    if loc[:1] == ("pairs",) and len(loc) > 1:
        return Pair
    return PairOptions if loc[:1] == ("defaults",) and len(loc) > 1 else Job


def _explain_unknown(place: str, loc: tuple[int | str, ...]) -> str:
    known = list(_model_at(loc).model_fields)
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    remedy = f"did you mean `{near[0]}`?" if near else f"known keys are {', '.join(sorted(known))}"
    return f"{place} is not a known key; {remedy}"


def _field_text(loc: tuple[int | str, ...]) -> str:
    field = _model_at(loc).model_fields.get(str(loc[-1]))
    return " ".join((field.description or "").split()) if field else "add it"

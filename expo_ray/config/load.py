"""Read a job file, and report everything wrong with it at once, each problem with its place and its remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from expo_ray.config.job import Job
from expo_ray.config.pairs import Pair
from expo_ray.errors import JobError, Problems
from expo_ray.text import remember_url_secrets, shown
from expo_ray.untrusted import YAML_BYTES, parse_yaml


def load_job(path: str | Path) -> Job:
    """Read and check a job file.

    Raises:
        JobError: if the file cannot be read or is not YAML.
        Problems: with everything that is wrong in it.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(YAML_BYTES + 1)
    except (OSError, ValueError) as error:
        raise JobError(f"{path}: cannot be read ({error}); give the path of a YAML job file") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise JobError(
            f"{path}: holds {type(data).__name__}; a job file is a mapping with `output` and `pairs`"
        )
    return parse_job(data, str(path))


def parse_job(data: Mapping[str, Any], source: str) -> Job:
    """Check a job given as plain data; `source` stands before each problem."""
    remember_url_secrets(data)
    try:
        return Job.model_validate(dict(data))
    except ValidationError as error:
        raise Problems([JobError(f"{source}: {text}") for text in dict.fromkeys(_explain(error))]) from error


def parse_pair(data: Mapping[str, Any], source: str) -> Pair:
    """Check one pair given as plain data; `source` stands before each problem."""
    remember_url_secrets(data)
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
            continue  # inherited; reported once, at its place
        if problem["type"] == "default_factory_not_called":
            continue  # the default depends on a key that is wrong, and reported itself
        if problem["loc"] == ("pairs",) and problem["type"] == "too_short" and in_pairs:
            continue  # pydantic counts the valid pairs only
        place = "".join(
            f"[{part}]" if isinstance(part, int) else f".{shown(part, 80)}" for part in problem["loc"]
        ).lstrip(".")
        if problem["type"] == "extra_forbidden":
            yield _explain_unknown(place, problem["loc"])
        elif problem["type"] == "missing":
            yield f"{place} is missing; {_field_text(problem['loc'])}"
        else:
            text = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            value = shown(repr(given)) if isinstance(given, str | int | float | bool) else ""
            quoted = f" (found {value})" if value and value not in text else ""
            yield f"{place}: {text}{quoted}" if place else text


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The section of the job file, or of a pair checked by itself, in which `loc` names a key."""
    model: type[BaseModel] = Job
    for part in loc[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = next(iter(_models_in(model.model_fields[part].annotation)), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _explain_unknown(place: str, loc: tuple[int | str, ...]) -> str:
    known = list(_model_at(loc).model_fields)
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    remedy = f"did you mean `{near[0]}`?" if near else f"known keys are {', '.join(sorted(known))}"
    return f"{place} is not a known key; {remedy}"


def _field_text(loc: tuple[int | str, ...]) -> str:
    field = _model_at(loc).model_fields.get(str(loc[-1]))
    return " ".join((field.description or "").split()) if field else "add it"

"""The file `results.json` of a run: written and read strictly, so that what is read is what was written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from expo_ray import __version__
from expo_ray.config import format_alpha
from expo_ray.errors import NotFound, OutputError
from expo_ray.report.results import FORMAT, Results
from expo_ray.storage import Store
from expo_ray.text import first_few, shown
from expo_ray.untrusted import parse_json_object

RESULTS = "results.json"
# It holds a few examples of each pair with all their texts.
RESULTS_BYTES = 128 * 2**20


def write_results(store: Store, results: Results) -> None:
    """Store `results` as `results.json` of a run, replacing any."""
    store.put(RESULTS, results_json(results))


def read_results(store: Store) -> Results:
    """Read the results of the run whose output folder `store` is.

    Raises:
        OutputError: if there are none, or this version cannot read them.
    """
    where = f"{store.uri}/{RESULTS}"
    try:
        data = store.read(RESULTS, most_bytes=RESULTS_BYTES)
    except NotFound as error:
        raise OutputError(
            f"{where} is not there; name the `output` of a job that `expo-ray run` has finished"
        ) from error
    return parse_results(data, where)


def results_json(results: Results) -> bytes:
    """The text of `results.json`.

    Plain JSON that any tool reads: alphas as keys are text, numbers that are not finite are `inf`, `-inf` and `nan`, and half a surrogate
    pair, which no encoding has, is U+FFFD.
    """
    text = json.dumps(_plain(results), indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode() + b"\n"


def parse_results(data: bytes, where: str = RESULTS) -> Results:
    """Parse the text that `results_json` gives.

    Raises:
        OutputError: if the text is damaged, has another format, or fields that are missing, unknown or of another type.
    """
    remedy = "run the job again, it writes the file anew from what is stored"
    content = parse_json_object(
        data,
        f"{where} is no result of a run",
        most_bytes=RESULTS_BYTES,
        strict=True,
        error=OutputError,
        remedy=remedy,
    )
    version = content.get("format")
    if version != FORMAT:
        versions = content.get("versions")
        writer = versions.get("expo-ray") if isinstance(versions, dict) else None
        raise OutputError(
            f"{where} has format {shown(version, 40)}, written by expo-ray {shown(writer or 'of another version', 40)}; expo-ray "
            f"{__version__} reads format {FORMAT}. Install the version that wrote it, or run the job again with this one"
        )
    try:
        return _adapter().validate_json(data, strict=True)
    except ValidationError as error:
        problems = [
            f"{shown('.'.join(map(str, fault['loc'])))}: {shown(fault['msg'])}"
            for fault in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise OutputError(
            f"{where} does not hold what expo-ray {__version__} writes ({first_few(problems)}); run the job again, it writes the file anew from "
            "what is stored"
        ) from error


@cache
def _adapter() -> TypeAdapter[Results]:
    return TypeAdapter(Results)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in fields(value)
            if not (field.metadata.get("added") and getattr(value, field.name) == field.default)
        }
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else format_alpha(key): _plain(inner) for key, inner in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

"""Checks a manifest as the API server of a Kubernetes cluster with KubeRay would, without one.

A CRD states structure (an OpenAPI schema) and rules (CEL). Defaults are filled in first, and unknown fields refused, as
`kubectl --validate=strict` does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.support.paths import SHARED

REFERENCE = SHARED / "reference" / "kuberay-1.7.0"

Schema = dict[str, Any]


def load_schema(crd: Path, version: str) -> Schema:
    """The OpenAPI schema of one version in a CRD file."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 1.4 MB take 20 s in pure Python
    versions = yaml.load(crd.read_text(), Loader=loader)["spec"]["versions"]
    schema: Schema = next(
        entry["schema"]["openAPIV3Schema"] for entry in versions if entry["name"] == version
    )
    return schema


def problems(schema: Schema, manifest: dict[str, Any]) -> list[str]:
    """Everything the API server would refuse, each with its place; empty for a valid manifest."""
    manifest = copy.deepcopy(manifest)
    _fill_defaults(schema, manifest)
    strict = _as_json_schema(schema)
    strict["properties"]["metadata"] = {"type": "object"}
    errors = jsonschema.Draft202012Validator(strict).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in errors] + list(
        _broken_rules(schema, manifest, "$")
    )


def _fill_defaults(schema: Schema, value: Any) -> None:
    if isinstance(value, dict):
        for key in [key for key, item in value.items() if item is None]:
            del value[key]
        for key, inner in schema.get("properties", {}).items():
            if "default" in inner:
                value.setdefault(key, copy.deepcopy(inner["default"]))
    for inner, item, _ in _children(schema, value):
        _fill_defaults(inner, item)


def _children(schema: Schema, value: Any) -> Iterator[tuple[Schema, Any, str]]:
    if isinstance(value, dict):
        rest = schema.get("additionalProperties")
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, rest)
            if isinstance(inner, dict):
                yield inner, item, f".{key}"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield schema.get("items", {}), item, f"[{index}]"


def _as_json_schema(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_as_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {
        key: _as_json_schema(item) for key, item in schema.items() if not key.startswith("x-kubernetes-")
    }
    strict.pop("format", None)
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get(
        "x-kubernetes-embedded-resource"
    )
    if isinstance(schema.get("properties"), dict) and not open_ended:
        strict.setdefault("additionalProperties", False)
    return strict


def _broken_rules(schema: Schema, value: Any, place: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            yield f"{place}: {rule.get('message', rule['rule'])}"
    for inner, item, step in _children(schema, value):
        yield from _broken_rules(inner, item, place + step)


def _holds(rule: str, value: Any) -> bool:
    import celpy
    from celpy.adapter import json_to_cel

    environment = celpy.Environment()
    program = environment.program(environment.compile(rule))
    return bool(program.evaluate({"self": json_to_cel(value)}))

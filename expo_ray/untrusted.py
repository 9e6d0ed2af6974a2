"""The one reader of JSON, YAML and regular expressions that came from outside, with limits on size, depth and time.

Whatever is wrong with an input becomes one `ExpoError` (of the class that the caller names) with its source, the cause and a
remedy: never another exception, a hang, or memory beyond a small multiple of the limit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeVar

import regex
import yaml
from pydantic import BaseModel, ValidationError

from expo_ray.errors import CheckpointError, ExpoError, JobError
from expo_ray.text import shown

# The largest config.json in use has some 100 kB.
CONFIG_BYTES = 2**20
# The largest tokenizer.json in use is about 35 MB; parsed JSON takes up to 25 times its size in memory.
TOKENIZER_BYTES = 64 * 2**20
_DEEPEST = 64
_YAML_BYTES = 2**20
_YAML_VALUES = 100_000
_LONGEST_PATTERN = 1000
_PATTERN_TIMEOUT_S = 1.0
_AGAIN = "download the file again"

M = TypeVar("M", bound=BaseModel)


def parse_json(
    data: bytes | str,
    source: str,
    *,
    most_bytes: int = CONFIG_BYTES,
    strict: bool = False,
    error: type[ExpoError] = CheckpointError,
    remedy: str = _AGAIN,
    surrogates: bool = False,
) -> Any:
    """One JSON value (RFC 8259) in UTF-8.

    Args:
        data: the text; a lone surrogate is refused, escaped or not.
        source: names the text in errors.
        most_bytes: refuse a longer text before it is parsed.
        strict: refuse a key that stands twice in one object, NaN and Infinity, all of which other readers take differently.
        error: the class of what is raised.
        remedy: ends the message.
        surrogates: take half of a surrogate pair, for texts that are only passed on.

    Raises:
        ExpoError: of the class `error`, whatever is wrong.
    """
    if len(data) > most_bytes:
        raise error(f"{source}: {len(data)} bytes of JSON, more than the {most_bytes} read here; {remedy}")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique if strict else None,
            parse_constant=_no_constant if strict else None,
            parse_int=_parse_int,
        )
        if not surrogates and ("\\u" in text or isinstance(data, str)):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on half of a surrogate pair
    except RecursionError as fault:
        raise error(f"{source}: JSON nested too deeply; {remedy}") from fault
    except ValueError as fault:
        raise error(f"{source}: not valid JSON ({shown(fault)}); {remedy}") from fault
    if text.count("[") + text.count("{") > _DEEPEST and _too_deep(value):
        raise error(f"{source}: JSON nested more than {_DEEPEST} levels deep; {remedy}")
    return value


def parse_json_object(
    data: bytes | str,
    source: str,
    *,
    most_bytes: int = CONFIG_BYTES,
    strict: bool = False,
    error: type[ExpoError] = CheckpointError,
    remedy: str = _AGAIN,
) -> dict[str, Any]:
    """One JSON object; arguments and errors as of `parse_json`."""
    value = parse_json(data, source, most_bytes=most_bytes, strict=strict, error=error, remedy=remedy)
    if not isinstance(value, dict):
        raise error(f"{source}: a JSON {kind_of(value)} instead of an object; {remedy}")
    return value


def validated(model: type[M], data: object, source: str, *, error: type[ExpoError], remedy: str) -> M:
    """`data`, parsed before, as an instance of `model`.

    Raises:
        ExpoError: of the class `error`, with the first few fields that do not fit.
    """
    try:
        return model.model_validate(data)
    except ValidationError as fault:
        faults = [
            f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg'].removeprefix('Value error, ')}"
            for each in fault.errors(include_url=False)
        ]
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise error(f"{source}: {shown('; '.join(faults[:3]), 400)}{more}; {remedy}") from fault
    except (RecursionError, OverflowError) as fault:
        raise error(f"{source}: cannot be read ({shown(fault)}); {remedy}") from fault


def parse_yaml(text: str, source: str, *, error: type[ExpoError] = JobError) -> Any:
    """One YAML document of plain values.

    Refused are tags of other types, a key that stands twice, nesting beyond 64 levels, and aliases or merge keys that
    unfold to more than 100,000 values.

    Raises:
        ExpoError: of the class `error`, whatever is wrong.
    """
    if len(text) > _YAML_BYTES:
        raise error(f"{source}: {len(text)} characters, more than the {_YAML_BYTES} of a job file; split it")
    try:
        value = yaml.load(text, Loader=_PlainLoader)
        _check_unfolded(value)
    except yaml.YAMLError as fault:
        raise error(f"{source}: is not YAML ({shown(' '.join(str(fault).split()), 400)})") from fault
    except RecursionError as fault:
        raise error(f"{source}: YAML nested too deeply; write it flatter") from fault
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as fault:
        # PyYAML's own constructors let these through: a date 2024-13-45, `!!int foo`, a number of 5,000 digits.
        raise error(
            f"{source}: holds a value that YAML cannot read ({shown(fault)}); put it in quotes"
        ) from fault
    return value


class Pattern:
    """A regular expression from outside: a search in it ends within a second, whatever it is."""

    def __init__(self, text: str, compiled: regex.Pattern[str]) -> None:
        self.text = text
        self._compiled = compiled

    def search(self, name: str) -> bool:
        """Whether the expression is found anywhere in `name`.

        Raises:
            JobError: if the search takes too long.
        """
        return self._run(self._compiled.search, name)

    def fullmatch(self, name: str) -> bool:
        """Whether the expression is all of `name`; errors as of `search`."""
        return self._run(self._compiled.fullmatch, name)

    def _run(self, find: Any, name: str) -> bool:
        try:
            return find(name, timeout=_PATTERN_TIMEOUT_S) is not None
        except (TimeoutError, MemoryError, RecursionError) as fault:
            raise JobError(
                f"the pattern `{shown(self.text)}` takes more than {_PATTERN_TIMEOUT_S:.0f} s on the name {shown(name)}; "
                "write it without a repetition inside a repetition"
            ) from fault


@lru_cache(maxsize=1024)
def compile_pattern(text: str) -> Pattern:
    """A regular expression (syntax of Python's `re`), compiled by a matcher that knows a time limit.

    Raises:
        JobError: if it is not one, or longer than 1,000 characters.
    """
    if len(text) > _LONGEST_PATTERN:
        raise JobError(
            f"the pattern `{shown(text, 60)}` is longer than the {_LONGEST_PATTERN} characters that are read"
        )
    try:
        return Pattern(text, regex.compile(text, regex.V0))
    except (
        regex.error,
        ValueError,
        OverflowError,
        RecursionError,
        MemoryError,
        LookupError,
        TypeError,
    ) as fault:
        raise JobError(f"{shown(text)!r} is not a regular expression ({shown(fault)})") from fault


def kind_of(value: object) -> str:
    """The JSON type of a parsed value, as a word."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _parse_int(text: str) -> int | float:
    # JSON readers with unsigned integers refuse a sign, even before 0.
    return -0.0 if text == "-0" else int(text)


def _too_deep(value: Any) -> bool:
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [inner for container in level for inner in _inside(container)]
        if not level:
            return False
    return True


def _inside(container: Any) -> Iterable[Any]:
    values = container.values() if isinstance(container, dict) else container
    return (
        [value for value in values if isinstance(value, dict | list)]
        if isinstance(container, dict | list)
        else ()
    )


def _check_unfolded(value: Any) -> None:
    """Walk every value as often as aliases repeat it, up to the limits."""
    stack, seen = [(value, 0)], 0
    while stack:
        inner, depth = stack.pop()
        seen += 1
        if seen > _YAML_VALUES:
            raise ValueError(f"aliases or merge keys unfold to more than {_YAML_VALUES} values")
        if depth > _DEEPEST:
            raise RecursionError
        if isinstance(inner, dict):
            stack += [(child, depth + 1) for child in (*inner.keys(), *inner.values())]
        elif isinstance(inner, list | tuple | set):
            stack += [(child, depth + 1) for child in inner]


class _PlainLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, which YAML forbids and PyYAML takes; the last would count."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        own = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [key for key, count in Counter(map(str, own)).items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {shown(twice[0])!r} stands twice", node.start_mark
            )
        super().flatten_mapping(node)
        self._merged += len(node.value)
        if self._merged > _YAML_VALUES:
            raise ValueError(f"aliases or merge keys unfold to more than {_YAML_VALUES} values")

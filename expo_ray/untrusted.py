"""The one reader of JSON, YAML and regular expressions that came from outside, with limits on size, depth and time.

Whatever is wrong with an input becomes one `ExpoError` (of the class that the caller names) with its source, the cause and a
remedy: never another exception, a hang, or memory beyond a small multiple of the limit.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeVar

import regex
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from expo_ray.errors import CheckpointError, ExpoError, JobError
from expo_ray.text import shown

# The largest config.json in use has some 100 kB.
CONFIG_BYTES = 2**20
# The largest tokenizer.json in use is about 35 MB.
TOKENIZER_BYTES = 128 * 2**20
_DEEPEST = 64
# `{"a":1},` takes 240 bytes of memory and `[],` takes 64, so that the length of a text bounds little. The largest real count is
# that of a weight file with a million tensors.
_JSON_VALUES = 16_000_000
_VALUES_OF_AN_OBJECT = 4
# Every integer of so few digits can be compared with, and turned into, a double.
_LONGEST_NUMBER = 300
YAML_BYTES = 2**20
_YAML_VALUES = 100_000
_MERGE = "tag:yaml.org,2002:merge"
_LONGEST_PATTERN = 1000
_PATTERN_TIMEOUT_S = 1.0
# Of all searches with one pattern together, as a model can have 100,000 names; an ordinary search takes microseconds.
_PATTERN_BUDGET_S = 5.0
_SLOW_SEARCH_S = 0.001
_AGAIN = "download the file again"

_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP = re.compile(r"\(([^()]*)\)([*+]|\{\d*,?\d*\})?")
_REPETITION = re.compile(r".(?:[*+]|\{\d*,\d*\})[?]?", re.DOTALL)

M = TypeVar("M", bound=BaseModel)


class Foreign(BaseModel):
    """Base of the models of data from outside: exact types, no NaN or infinity; unknown keys are left alone."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


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
    """Parse one JSON value (RFC 8259) in UTF-8.

    Refused are half surrogate pairs, escaped or not, integers of more than 300 digits, numbers beyond a double's range, nesting
    beyond 64 levels, and more than some 16 million values.

    Args:
        data: the text.
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
        lists, objects = text.count("["), text.count("{")
        if text.count(",") + lists + _VALUES_OF_AN_OBJECT * objects > _JSON_VALUES:
            raise ValueError("too many values")
        value = json.loads(
            text,
            object_pairs_hook=_unique if strict else None,
            parse_constant=_no_constant if strict else None,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
        if lists + objects > _DEEPEST:
            _check_depth(value)
        if not surrogates and (isinstance(data, str) or "\\ud" in text or "\\uD" in text):
            _check_unicode(value)
    except RecursionError as fault:
        raise error(f"{source}: JSON nested too deeply; {remedy}") from fault
    except MemoryError as fault:
        raise error(f"{source}: too little memory for {len(data)} bytes of JSON; {remedy}") from fault
    except ValueError as fault:
        raise error(f"{source}: not valid JSON ({shown(fault)}); {remedy}") from fault
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
    """Parse one JSON object; arguments and errors as of `parse_json`."""
    value = parse_json(data, source, most_bytes=most_bytes, strict=strict, error=error, remedy=remedy)
    if not isinstance(value, dict):
        raise error(f"{source}: a JSON {kind_of(value)} instead of an object; {remedy}")
    return value


def validated(model: type[M], data: object, source: str, *, error: type[ExpoError], remedy: str) -> M:
    """Check `data`, parsed before, against `model`.

    Raises:
        ExpoError: of the class `error`, with the first few fields that do not fit.
    """
    try:
        return model.model_validate(data)
    except ValidationError as fault:
        faults = [
            f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg'].removeprefix('Value error, ')}"
            for each in fault.errors(include_url=False, include_input=False, include_context=False)
        ]
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise error(f"{source}: {shown('; '.join(faults[:3]), 400)}{more}; {remedy}") from fault
    except (ArithmeticError, RecursionError) as fault:
        raise error(f"{source}: cannot be read ({shown(fault)}); {remedy}") from fault


def parse_yaml(text: str, source: str, *, error: type[ExpoError] = JobError) -> Any:
    """Parse one YAML document of plain values.

    Refused are tags of other types, a key that stands twice, nesting beyond 64 levels, integers of more than 300 digits, and
    aliases or merge keys that unfold to more than 100,000 values.

    Raises:
        ExpoError: of the class `error`, whatever is wrong.
    """
    if len(text) > YAML_BYTES:
        raise error(f"{source}: {len(text)} characters, more than the {YAML_BYTES} of a job file; split it")
    try:
        value = yaml.load(text, Loader=_PlainLoader)
        _check_unfolded(value)
    except yaml.YAMLError as fault:
        raise error(f"{source}: is not YAML ({_yaml_fault(fault)})") from fault
    except RecursionError as fault:
        raise error(f"{source}: YAML nested too deeply; write it flatter") from fault
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, MemoryError) as fault:
        # PyYAML's own constructors let these through: a date 2024-13-45, `!!int foo`, a number of 5,000 digits.
        raise error(
            f"{source}: holds a value that YAML cannot read ({shown(fault)}); put it in quotes"
        ) from fault
    return value


def _yaml_fault(fault: yaml.YAMLError) -> str:
    """Cause and place, without the line itself that PyYAML quotes: half of a password may stand there."""
    if not isinstance(fault, yaml.MarkedYAMLError):
        return shown(fault)
    mark = fault.problem_mark or fault.context_mark
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return shown(", ".join(filter(None, [fault.context, fault.problem])), 300) + place


class Pattern:
    """A regular expression from outside: a search ends within a second, and all searches with it within seconds."""

    def __init__(self, text: str, compiled: regex.Pattern[str]) -> None:
        self.text = text
        self._compiled = compiled
        self._spent_s = 0.0

    def search(self, name: str) -> bool:
        """Return whether the expression matches anywhere in `name`.

        Raises:
            JobError: if the search takes too long.
        """
        return self._run(self._compiled.search, name)

    def fullmatch(self, name: str) -> bool:
        """Return whether the expression matches all of `name`; errors as of `search`."""
        return self._run(self._compiled.fullmatch, name)

    def _run(self, find: Any, name: str) -> bool:
        began = time.thread_time()
        try:
            matched = find(name, timeout=_PATTERN_TIMEOUT_S) is not None
        except (TimeoutError, MemoryError, RecursionError) as fault:
            self._spent_s = _PATTERN_BUDGET_S  # hundreds of names may follow
            raise self._too_slow(name) from fault
        took = time.thread_time() - began
        if took > _SLOW_SEARCH_S:
            self._spent_s += took
            if self._spent_s > _PATTERN_BUDGET_S:
                raise self._too_slow(name)
        return matched

    def _too_slow(self, name: str) -> JobError:
        return JobError(
            f"the pattern `{shown(self.text)}` takes too long on names such as {shown(name, 80)}; write it without a repetition "
            "inside a repetition"
        )


@lru_cache(maxsize=1024)
def compile_pattern(text: str) -> Pattern:
    """Compile a regular expression (syntax of Python's `re`) for a matcher that knows a time limit.

    Raises:
        JobError: if it is not one, or longer than 1,000 characters.
    """
    if len(text) > _LONGEST_PATTERN:
        raise JobError(
            f"the pattern `{shown(text, 60)}` is longer than the {_LONGEST_PATTERN} characters that are read; write it shorter"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(text)  # the matcher takes more than `re`, of which nothing else here knows
        return Pattern(text, regex.compile(text, regex.V0))
    except (
        ValueError,
        ArithmeticError,
        LookupError,
        TypeError,
        RuntimeError,
        MemoryError,
        re.error,
        regex.error,
    ) as fault:
        raise JobError(f"{shown(text)!r} is not a regular expression ({shown(fault)}); correct it") from fault


def is_ambiguous(text: str) -> bool:
    """Return whether a pattern repeats a repetition or a choice between equal texts, such as `(a+)+` and `(a|a)*`.

    Other programs match it with Python's `re`, which can then take for ever.
    """
    return len(text) <= _LONGEST_PATTERN and any(
        len(set(alternatives)) < len(alternatives) or any(map(_REPETITION.fullmatch, alternatives))
        for alternatives in _repeated_groups(text)
    )


def _repeated_groups(text: str) -> Iterable[list[str]]:
    """The alternatives of each group that is followed by a repetition, every group inside them written as one character."""
    # Classes and escapes are one character each to what follows, and no brackets.
    plain = _ATOM.sub(lambda atom: "\0" if atom[0].startswith("[") else "\1", text)
    plain = re.sub(r"\(\?(?:P<\w+>|[:>=!]|<[=!])", "(", plain)
    while match := _GROUP.search(plain):
        if match[2]:
            yield match[1].split("|")
        plain = f"{plain[: match.start()]}\2{plain[match.end(1) + 1 :]}"


def without_halves(value: Any) -> Any:
    """Make `?` of each half of a surrogate pair in a parsed value; no file can hold one."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def kind_of(value: object) -> str:
    """The JSON type of a parsed value, as a word."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice")
    return values


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _parse_int(text: str) -> int | float:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    # JSON readers with unsigned integers refuse a sign, even before 0.
    return -0.0 if text == "-0" else int(text)


def _parse_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond the range of a number")
    return number


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [inner for container in level for inner in _children(container) if _children(inner)]
        if not level:
            return
    raise RecursionError


def _check_unicode(value: Any) -> None:
    """Raise a `ValueError` on a text with half of a surrogate pair."""
    stack = [value]
    while stack:
        inner = stack.pop()
        if isinstance(inner, str):
            if not inner.isascii():
                inner.encode("utf-8")
        elif isinstance(inner, dict):
            stack += inner.keys()
            stack += inner.values()
        elif isinstance(inner, list):
            stack += inner


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


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
        if isinstance(inner, bytes):
            raise ValueError("binary data")
        if isinstance(inner, int) and inner.bit_length() > 3 * _LONGEST_NUMBER:
            raise ValueError(f"an integer of more than {_LONGEST_NUMBER} digits")
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
        own = [
            (key.tag, key.value)
            for key, _ in node.value
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE
        ]
        if len(set(own)) < len(own):
            twice = Counter(own).most_common(1)[0][0][1]
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {shown(twice, 60)!r} stands twice", node.start_mark
            )
        # PyYAML copies all that is merged into one list, so the sum is checked before.
        for key, value in node.value:
            if key.tag == _MERGE:
                self._count_merged(value)
        super().flatten_mapping(node)

    def _count_merged(self, value: yaml.Node) -> None:
        for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(source, yaml.MappingNode):
                self.flatten_mapping(source)
                self._merged += len(source.value) + 1
            if self._merged > _YAML_VALUES:
                raise ValueError(f"aliases or merge keys unfold to more than {_YAML_VALUES} values")

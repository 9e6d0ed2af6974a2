"""Flags of the command line: made from the fields of a job file, and named where an error speaks of the job file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel

from expo_ray.config import check_repo_id, parse_bytes
from expo_ray.progress import size_text

# Flags that may be repeated are called by the singular of their key.
_SINGULAR = {"alphas": "alpha", "multipliers": "multiplier"}
_SETTING = re.compile(r"`(\w+): ([^`]+)`")
_ITEM = re.compile(r"\{(.+): (.+)\}")

T = TypeVar("T")


def add_field(
    parser: argparse.ArgumentParser, model: type[BaseModel], field: str, flag: str = "", **options: Any
) -> None:
    """Add a flag for a field of the job file, with the field's name, choices and help.

    A flag that is not given is None, so that the default of the model counts.

    Args:
        flag: another name than the field's, such as `--prompts`.
        options: of `add_argument`, in the place of those that the field gives.
    """
    kind = model.model_fields[field].annotation
    if kind is bool:
        given: dict[str, Any] = {"action": "store_true", "default": None}
    elif get_origin(kind) is Literal:
        given = {"choices": get_args(kind)}
    else:
        given = {"metavar": "N"}
    parser.add_argument(flag or _option(field), **{**given, "help": help_of(model, field), **options})


def help_of(model: type[BaseModel], field: str) -> str:
    """The help text of a field, with its default."""
    info = model.model_fields[field]
    text = " ".join((info.description or "").split()).replace("%", "%%")
    default = default_of(model, field)
    if isinstance(default, bool) or not isinstance(default, str | int | float) or default == "":
        return text
    shown = size_text(default) if isinstance(default, int) and default >= 1_000_000 else default
    return f"{text} Default: {shown}."


def default_of(model: type[BaseModel], field: str) -> Any:
    """The default of a field; None where it has to be set."""
    info = model.model_fields[field]
    return None if info.is_required() else info.get_default(call_default_factory=True)


def multiplier(text: str) -> tuple[str, str]:
    """Parse `REGEX=M`."""
    pattern, equals, factor = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no factor; write it like 'embed_tokens|lm_head=0'")
    return pattern, factor


def count(text: str) -> int:
    """Parse a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def repo_id(text: str) -> str:
    """Parse `ORG/NAME`."""
    return _parsed(check_repo_id, text)


def size(text: str) -> int:
    """Parse a number of bytes, such as `5GB`."""
    return _parsed(parse_bytes, text)


def _parsed(parse: Callable[[str], T], text: str) -> T:
    """Call `parse`, whose message argparse prints only from its own class of error."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def with_alphas_joined(words: Sequence[str]) -> list[str]:
    """The words with `--alpha -1e-3` joined to one, as argparse takes `-1e-3` and `-inf` for options."""
    joined = list(words)
    for index in reversed(range(len(joined) - 1)):
        if joined[index] == "--alpha" and joined[index + 1].startswith("-"):
            joined[index : index + 2] = [f"--alpha={joined[index + 1]}"]
    return joined


def given_flags(arguments: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The flags among `names` that were given, as they are typed."""
    return [_option(name) for name in names if getattr(arguments, name) is not None]


def flags_of(arguments: argparse.Namespace) -> frozenset[str]:
    """The keys of the job file that this command takes as flags; none where it was given a job file."""
    return frozenset() if getattr(arguments, "job", None) else frozenset(vars(arguments))


def with_flags(text: str, flags: Collection[str]) -> str:
    """The text of an error, with flags in the place of the job file's keys.

    Example:
        >>> with_flags("set `vocab: by-token`, or `multipliers: {lm_head: 0}`", {"vocab", "multiplier"})
        "set `--vocab by-token`, or `--multiplier 'lm_head=0'`"
    """

    def flag(setting: re.Match[str]) -> str:
        key, value = setting.groups()
        name = _SINGULAR.get(key, key)
        if key not in flags and name not in flags:
            return setting[0]
        option = _option(name)
        if item := _ITEM.fullmatch(value):
            return f"`{option} '{item[1]}={item[2]}'`"
        return f"`{option}`" if value == "true" else f"`{option} {value}`"

    return _SETTING.sub(flag, text)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"

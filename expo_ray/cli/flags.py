"""One flag of the command line: its help, what its text means, and its name where an error speaks of the job file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable, Sequence

from pydantic import BaseModel

from expo_ray.config import check_repo_id, parse_bytes
from expo_ray.progress import size_text

# Where a flag that may be repeated is not called as its key.
_SINGULAR = {"alphas": "alpha", "multipliers": "multiplier"}
_SETTING = re.compile(r"`(\w+): ([^`]+)`")
_ITEM = re.compile(r"\{(.+): (.+)\}")


def multiplier(text: str) -> tuple[str, str]:
    """The type of `REGEX=M`."""
    pattern, equals, factor = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no factor; write it like 'embed_tokens|lm_head=0'")
    return pattern, factor


def count(text: str) -> int:
    """The type of a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def with_alphas_joined(words: Sequence[str]) -> list[str]:
    """`--alpha -1e-3` as one word, as argparse takes `-1e-3` and `-inf` for options."""
    joined = list(words)
    for index in reversed(range(len(joined) - 1)):
        if joined[index] == "--alpha" and joined[index + 1].startswith("-"):
            joined[index : index + 2] = [f"--alpha={joined[index + 1]}"]
    return joined


def repo_id(text: str) -> str:
    """The type of `ORG/NAME`."""
    try:
        return check_repo_id(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size(text: str) -> int:
    """The type of a number of bytes, such as `5GB`."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def help_of(model: type[BaseModel], field: str) -> str:
    """The help text of a field, with its default."""
    info = model.model_fields[field]
    text = " ".join((info.description or "").split()).replace("%", "%%")
    default = info.get_default(call_default_factory=True) if not info.is_required() else None
    if isinstance(default, bool) or not isinstance(default, str | int | float) or default == "":
        return text
    shown = size_text(default) if isinstance(default, int) and default >= 1_000_000 else default
    return f"{text} Default: {shown}."


def given_flags(arguments: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of the flags `names` that were given, as they are typed."""
    return [_option(name) for name in names if getattr(arguments, name) is not None]


def flags_of(parsed: argparse.Namespace) -> frozenset[str]:
    """The keys of the job file that the command at work takes as flags; none where it was given a job file."""
    return frozenset() if getattr(parsed, "job", None) else frozenset(vars(parsed))


def with_flags(text: str, flags: Collection[str]) -> str:
    """An error's text with flags in the place of the job file's keys, as far as there are any.

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

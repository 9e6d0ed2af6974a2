"""Files with a row of JSON for each judgment, which somebody else wrote: every problem in them is reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expo_ray.benchmark.answer_files import MOST_BYTES, read_unpacked
from expo_ray.errors import BenchmarkError
from expo_ray.text import shown
from expo_ray.untrusted import kind_of, parse_json

_AGAIN = "give a JSON list of rows, or one row a line"
_MOST_SHOWN = 5


@dataclass(frozen=True)
class RowFile:
    """The rows of a file that are JSON objects, each with its place, and what is wrong with the others."""

    source: str
    rows: tuple[tuple[str, Mapping[str, Any]], ...]
    problems: tuple[BenchmarkError, ...]


def read_row_file(uri: str) -> RowFile:
    """Read a JSON list of objects or JSON lines, either also as .gz.

    Args:
        uri: a file in any store.

    Raises:
        BenchmarkError: if it holds no row at all, or is a list that is not JSON.
        StorageError: if it cannot be read.
    """
    data = read_unpacked(uri).removeprefix(b"\xef\xbb\xbf")  # an editor's byte order mark
    if not data.strip():
        raise BenchmarkError(f"{uri}: is empty; {_AGAIN}")
    values = list(_in_list(data, uri) if data.lstrip()[:1] == b"[" else _in_lines(data, uri))
    rows = tuple((place, value) for place, value in values if isinstance(value, Mapping))
    faults = [fault for _, fault in values if isinstance(fault, BenchmarkError)]
    others = [
        f"{place} ({kind_of(value)})" for place, value in values if not isinstance(value, Mapping | Exception)
    ]
    problems = faults[:_MOST_SHOWN]
    if len(faults) > _MOST_SHOWN:
        problems.append(
            BenchmarkError(f"{uri}: {len(faults) - _MOST_SHOWN} more lines are not JSON; {_AGAIN}")
        )
    if others:
        problems.append(BenchmarkError(f"{uri}: not a JSON object in {places(others)}; {_AGAIN}"))
    if not rows and not problems:
        raise BenchmarkError(f"{uri}: holds no rows; {_AGAIN}")
    return RowFile(uri, rows, tuple(problems))


def places(names: Iterable[str], shown_at_most: int = _MOST_SHOWN) -> str:
    """The first few places, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - shown_at_most} more" if len(listed) > shown_at_most else ""
    return ", ".join(shown(name, 60) for name in listed[:shown_at_most]) + more


def _in_list(data: bytes, uri: str) -> Iterable[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(_parsed(data, uri), start=1))


def _in_lines(data: bytes, uri: str) -> Iterable[tuple[str, Any]]:
    # Not splitlines(): texts hold U+2028 and its like.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", _parsed(line, f"{uri} line {number}")
            except BenchmarkError as error:
                yield f"line {number}", error


def _parsed(data: bytes, source: str) -> Any:
    return parse_json(
        data,
        source,
        most_bytes=MOST_BYTES,
        error=BenchmarkError,
        remedy=_AGAIN,
        surrogates=True,
    )

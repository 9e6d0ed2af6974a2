"""Read files of JSON rows that other programs wrote: a list or a row a line, perhaps packed, in any store."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from expo_ray.errors import BenchmarkError
from expo_ray.storage import open_store, split_file
from expo_ray.text import first_few, shown
from expo_ray.untrusted import kind_of, parse_json

MOST_BYTES = 256 * 2**20
_REMEDY = "give a JSON list of rows, or one row a line"
_MOST_SHOWN = 5


@dataclass(frozen=True)
class RowFile:
    """The rows of a file.

    Attributes:
        source: path or URI of the file.
        rows: those that are JSON objects, each with its place in the file.
        problems: faults of the other rows.
    """

    source: str
    rows: tuple[tuple[str, Mapping[str, Any]], ...]
    problems: tuple[BenchmarkError, ...]


def read_unpacked(uri: str) -> bytes:
    """Read a whole file of any store, unpacked if it is gzip.

    Raises:
        BenchmarkError: if it is larger than 256 MiB, or damaged.
        StorageError: if it cannot be read.
    """
    folder, name = split_file(uri)
    data = open_store(folder).read(name)
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            unpacked = packed.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BenchmarkError(f"{uri}: is not whole ({shown(error)}); fetch it again") from error
    if len(unpacked) > MOST_BYTES:
        raise BenchmarkError(f"{uri}: unpacks to more than {MOST_BYTES} bytes; give the right file")
    return unpacked


def parse_rows(data: bytes, source: str) -> list[tuple[str, Any]]:
    """Parse a JSON list or JSON lines into rows, each with its place in the file.

    Raises:
        BenchmarkError: for the first row that is not JSON.
    """
    rows = list(_parse_each(data, source))
    for _, row in rows:
        if isinstance(row, BenchmarkError):
            raise row
    return rows


def read_row_file(uri: str) -> RowFile:
    """Read a JSON list of objects or JSON lines, packed or not; faulty rows are reported in the result.

    Args:
        uri: a file in any store.

    Raises:
        BenchmarkError: if the file has no rows, or is a list that is not JSON.
        StorageError: if it cannot be read.
    """
    data = read_unpacked(uri).removeprefix(b"\xef\xbb\xbf")  # an editor's byte order mark
    if not data.strip():
        raise BenchmarkError(f"{uri}: is empty; {_REMEDY}")
    values = list(_parse_each(data, uri))
    rows = tuple((place, value) for place, value in values if isinstance(value, Mapping))
    faults = [fault for _, fault in values if isinstance(fault, BenchmarkError)]
    others = [
        f"{place} ({kind_of(value)})" for place, value in values if not isinstance(value, Mapping | Exception)
    ]
    problems = faults[:_MOST_SHOWN]
    if len(faults) > _MOST_SHOWN:
        problems.append(
            BenchmarkError(f"{uri}: {len(faults) - _MOST_SHOWN} more lines are not JSON; {_REMEDY}")
        )
    if others:
        problems.append(BenchmarkError(f"{uri}: not a JSON object in {first_places(others)}; {_REMEDY}"))
    if not rows and not problems:
        raise BenchmarkError(f"{uri}: holds no rows; {_REMEDY}")
    return RowFile(uri, rows, tuple(problems))


def first_places(names: Iterable[str]) -> str:
    """The first few places or names, and the number of the others."""
    return first_few([shown(name, 60) for name in names])


def is_number(value: object) -> TypeGuard[int | float]:
    """True for a finite number of JSON; `true` is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _parse_each(data: bytes, uri: str) -> Iterable[tuple[str, Any]]:
    """Place and value of each row; the value is a `BenchmarkError` if a line is not JSON."""
    if data.lstrip()[:1] == b"[":
        yield from ((f"row {number}", row) for number, row in enumerate(_parsed(data, uri), start=1))
        return
    # Not splitlines(): texts hold U+2028 and similar line ends.
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
        remedy=_REMEDY,
        surrogates=True,
    )

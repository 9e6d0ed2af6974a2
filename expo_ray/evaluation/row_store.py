"""Rows stored in parts while they are made, and read back as one table: how a killed evaluation resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from typing import Any, Generic, Protocol, TypeVar, get_type_hints

from pydantic import create_model

from expo_ray.errors import StorageError
from expo_ray.evaluation.paths import part_key
from expo_ray.evaluation.records import digest
from expo_ray.storage import Store
from expo_ray.text import shown
from expo_ray.untrusted import TOKENIZER_BYTES, Foreign, parse_json_object, validated

# A file of another kind is bad in every line; its message should stay readable.
_LISTED_ROWS = 20
# A search has dozens of parts for each alpha, and reads them again on every rung; each costs a round trip to the store.
_PARTS_AT_ONCE = 8
_REMEDY = "correct or remove it"


class Row(Protocol):
    """A dataclass of plain data with a key."""

    @property
    def key(self) -> Hashable: ...


R = TypeVar("R", bound=Row)
T = TypeVar("T")


class RowStore(Generic[R]):
    """The rows in one folder of a store.

    Rows are stored in parts because an object store cannot append to a file, and replacing one growing file would lose rows when
    two writers do so at once. A part is written once and named after its content, so writers never overwrite each other. The
    same row may still be made twice, by a Ray task that was given up and lived on: every reader then takes the same one of them.

    Args:
        folder: of the parts, such as `evaluation/zephyr@0.3/1f2e3d4c/responses`.
        parse: makes a row from its plain data.
    """

    def __init__(self, store: Store, folder: str, parse: Callable[[Mapping[str, Any]], R]) -> None:
        self.store, self.folder, self._parse = store, folder, parse

    def read(self, wanted: Callable[[R], bool] = lambda row: True) -> dict[Hashable, R]:
        """Read the wanted rows, by key; of rows with the same key, the first in the order of the parts' names."""
        rows: dict[Hashable, R] = {}
        keys = [info.key for info in self.store.list(f"{self.folder}/")]

        def read_part(key: str) -> list[R]:
            return [row for row in read_rows(self.store, key, self._parse) if wanted(row)]

        with ThreadPoolExecutor(_PARTS_AT_ONCE, "part") as threads:
            for part in threads.map(read_part, keys):
                for row in part:
                    rows.setdefault(row.key, row)
        return rows

    def write(self, rows: Iterable[R]) -> None:
        """Store some rows as one part: all of them or none."""
        text = rows_text(rows)
        if text:
            self.store.put(part_key(self.folder, digest(text)), text.encode())


def rows_text(rows: Iterable[Any]) -> str:
    """Dataclasses as JSONL."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def read_rows(store: Store, key: str, parse: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """Read the rows of one JSONL file.

    Raises:
        StorageError: naming the lines that are no such rows.
    """
    rows: list[T] = []
    problems: list[str] = []
    # Not splitlines(): JSON leaves U+2028, U+2029 and U+0085 as they are in texts, and splitlines() takes each for a line end.
    for number, line in enumerate(store.read(key).split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(_parse_row(line, parse))
            except StorageError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        raise StorageError(f"{store.uri}/{key}: {bad_rows_message(problems)}")
    return rows


def _parse_row(line: bytes, parse: Callable[[Mapping[str, Any]], T]) -> T:
    data = parse_json_object(
        line, "not a row", most_bytes=TOKENIZER_BYTES, error=StorageError, remedy=_REMEDY
    )
    try:
        row = parse(data)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise StorageError(f"not a row that can be read ({shown(error)}); {_REMEDY}") from error
    row_class: Any = type(row)
    model = _validation_model(row_class)  # dataclasses accept values of any type
    validated(model, vars(row), "not a row that can be read", error=StorageError, remedy=_REMEDY)
    return row


@cache
def _validation_model(row_class: Any) -> type[Foreign]:
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in get_type_hints(row_class).items()}
    return create_model(row_class.__name__, __base__=Foreign, **fields)


def bad_rows_message(problems: Sequence[str]) -> str:
    """The end of a message about rows that cannot be read, each given as `<place>: <problem>`."""
    more = [f"and {len(problems) - _LISTED_ROWS} more"] if len(problems) > _LISTED_ROWS else []
    listed = "; ".join([*problems[:_LISTED_ROWS], *more])
    return f"{len(problems)} bad row(s), fix or remove them: {listed}"

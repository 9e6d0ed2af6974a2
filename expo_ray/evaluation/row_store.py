"""Rows that are stored in parts as they come, and read back as one: how a killed evaluation goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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

# A file that is something else altogether has a problem in every line.
_SHOWN = 20
_REMEDY = "correct or remove it"


class Row(Protocol):
    """A dataclass of plain data with a key."""

    @property
    def key(self) -> Hashable: ...


R = TypeVar("R", bound=Row)
T = TypeVar("T")


class RowStore(Generic[R]):
    """The rows below one prefix of a store.

    A part is written once and named after its content, so that writers never meet: a row that two of them made, because one was
    given up and lived on, counts once, the same one for every reader.

    Args:
        prefix: folder of the parts, such as `evaluation/zephyr@0.3/1f2e3d4c/responses`.
        parse: makes a row from its plain data.
    """

    def __init__(self, store: Store, prefix: str, parse: Callable[[Mapping[str, Any]], R]) -> None:
        self.store, self.prefix, self._parse = store, prefix, parse

    def read(self, wanted: Callable[[R], bool] = lambda row: True) -> dict[Hashable, R]:
        """The wanted rows by key; of rows with the same key, the first in the order of the parts' names."""
        rows: dict[Hashable, R] = {}
        for info in self.store.list(f"{self.prefix}/"):
            for row in filter(wanted, read_rows(self.store, info.key, self._parse)):
                rows.setdefault(row.key, row)
        return rows

    def write(self, rows: Iterable[R]) -> None:
        """Store some rows, all or none."""
        data = rows_text(rows).encode()
        if data:
            self.store.put(part_key(self.prefix, digest(data.decode())), data)


def rows_text(rows: Iterable[Any]) -> str:
    """Dataclasses as JSONL."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def read_rows(store: Store, key: str, parse: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """The rows of one JSONL file.

    Raises:
        StorageError: naming the lines that are no such rows.
    """
    rows: list[T] = []
    wrong: list[str] = []
    # Not splitlines(): texts hold U+2028 and its like.
    for number, line in enumerate(store.read(key).split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(_parse_row(line, parse))
            except StorageError as error:
                wrong.append(f"line {number}: {error}")
    if wrong:
        raise StorageError(f"{store.uri}/{key}: {bad_rows(wrong)}")
    return rows


def _parse_row(line: bytes, parse: Callable[[Mapping[str, Any]], T]) -> T:
    data = parse_json_object(
        line, "not a row", most_bytes=TOKENIZER_BYTES, error=StorageError, remedy=_REMEDY
    )
    try:
        row = parse(data)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise StorageError(f"not a row that can be read ({shown(error)}); {_REMEDY}") from error
    kind: Any = type(row)
    model = _model_of(kind)  # dataclasses take values of any type
    validated(model, vars(row), "not a row that can be read", error=StorageError, remedy=_REMEDY)
    return row


@cache
def _model_of(row: Any) -> type[Foreign]:
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in get_type_hints(row).items()}
    return create_model(row.__name__, __base__=Foreign, **fields)


def bad_rows(wrong: Sequence[str]) -> str:
    """What to say of rows that cannot be read, each given as its place and what is wrong with it."""
    more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
    rows = "; ".join([*wrong[:_SHOWN], *more])
    return f"{len(wrong)} bad row(s), fix or remove them: {rows}"

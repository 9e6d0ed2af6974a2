"""Read files of answers in the format of AlpacaEval's `model_outputs`."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expo_ray.errors import BenchmarkError, PromptError
from expo_ray.storage import open_store, split_file
from expo_ray.text import first_few, shown
from expo_ray.untrusted import kind_of, parse_json

MOST_BYTES = 256 * 2**20
_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class AnswerSet:
    """The outputs of a model.

    Attributes:
        name: the model's, from `generator` in its file, else from the name of the file.
        outputs: by instruction, in the order of the file.
        datasets: part of AlpacaEval that an instruction comes from, by instruction, if the file says so.
        source: path or URI of the file.
    """

    name: str
    outputs: Mapping[str, str]
    source: str
    datasets: Mapping[str, str] = field(default_factory=dict)


def read_answer_set(uri: str, instructions: Sequence[str] = ()) -> AnswerSet:
    """Read AlpacaEval's `model_outputs`: rows with `instruction`, `output` and `generator`.

    Args:
        uri: a .json list or .jsonl, either of them also as .gz, in any store.
        instructions: list that `index` points into, for files whose rows have an `index` instead of an instruction.

    Raises:
        PromptError: with all bad rows.
        StorageError: if the file cannot be read.
    """
    return parse_answer_set(parse_rows(read_unpacked(uri), uri), uri, instructions)


def parse_answer_set(
    rows: Sequence[tuple[str, Any]], source: str, instructions: Sequence[str] = ()
) -> AnswerSet:
    """Parse rows with their places into the outputs of a model; errors as of `read_answer_set`."""
    outputs: dict[str, str] = {}
    datasets: dict[str, str] = {}
    names: dict[str, None] = {}
    wrong: list[str] = []
    for place, row in rows:
        problem = _problem_of(row, instructions)
        if problem:
            wrong.append(f"{place}: {problem}")
            continue
        instruction = row["instruction"] if "instruction" in row else instructions[row["index"]]
        if instruction in outputs:
            wrong.append(f"{place}: repeats the instruction {shown(instruction, 60)!r}")
            continue
        outputs[instruction] = row["output"]
        names[str(row.get("generator") or "")] = None
        if isinstance(row.get("dataset"), str):
            datasets[instruction] = row["dataset"]
    if len(names) > 1:
        wrong.append(
            f"outputs of several models: {first_few([shown(name, 60) or 'without a name' for name in names])}"
        )
    if not rows:
        wrong.append("holds no rows")
    if wrong:
        more = f"\n    and {len(wrong) - _MOST_PROBLEMS} more" if len(wrong) > _MOST_PROBLEMS else ""
        listed = "\n    ".join(wrong[:_MOST_PROBLEMS])
        raise PromptError(f"{source}: {len(wrong)} bad row(s), correct or remove them:\n    {listed}{more}")
    name = next(iter(names)) or source.rstrip("/").rpartition("/")[2].partition(".")[0]
    return AnswerSet(name, outputs, source, datasets)


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
    """The rows of a JSON list or of JSON lines, each with its place.

    Raises:
        PromptError: if it is neither.
    """
    remedy = "give a list of rows as alpaca-eval writes it, or one row a line"
    if data.lstrip()[:1] == b"[":
        rows = parse_json(
            data, source, most_bytes=MOST_BYTES, error=PromptError, remedy=remedy, surrogates=True
        )
        if not isinstance(rows, list):
            raise PromptError(f"{source}: a JSON {kind_of(rows)} instead of a list; {remedy}")
        return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]
    # Not splitlines(): texts hold U+2028 and its like.
    return [
        (
            f"line {number}",
            parse_json(
                line,
                f"{source} line {number}",
                most_bytes=MOST_BYTES,
                error=PromptError,
                remedy=remedy,
                surrogates=True,
            ),
        )
        for number, line in enumerate(data.split(b"\n"), start=1)
        if line.strip()
    ]


def read_instructions(rows: Iterable[tuple[str, Any]], source: str) -> list[str]:
    """The instructions of a benchmark in their own order, from rows with `instruction` and perhaps `index`.

    Raises:
        PromptError: if a row has none, or the indexes do not count from 0.
    """
    placed: dict[int, str] = {}
    for number, (place, row) in enumerate(rows):
        if not isinstance(row, Mapping) or not isinstance(row.get("instruction"), str):
            raise PromptError(
                f"{source} {place}: no `instruction`; give the benchmark's list of instructions"
            )
        index = row.get("index", number)
        if type(index) is not int or index in placed:
            raise PromptError(f"{source} {place}: index {shown(index)} is not a place of its own")
        placed[index] = row["instruction"]
    if sorted(placed) != list(range(len(placed))):
        raise PromptError(f"{source}: the indexes of its {len(placed)} rows do not count from 0")
    return [placed[index] for index in range(len(placed))]


def _problem_of(row: Any, instructions: Sequence[str]) -> str:
    if not isinstance(row, Mapping):
        return f"a JSON {kind_of(row)} instead of an object"
    if not isinstance(row.get("output"), str):
        return f"`output` is {shown(row.get('output'), 60)}, not a text"
    if isinstance(row.get("instruction"), str):
        return ""
    index = row.get("index")
    if type(index) is int and 0 <= index < len(instructions):
        return ""
    if type(index) is int and not instructions:
        return "an `index` instead of an `instruction`, and no list of instructions to look it up in: give --covariates"
    return f"`instruction` is {shown(row.get('instruction'), 60)}, not a text"

"""Read files of answers in the format of AlpacaEval's `model_outputs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expo_ray.benchmark.row_files import parse_rows, read_unpacked
from expo_ray.errors import PromptError
from expo_ray.text import first_few, shown
from expo_ray.untrusted import kind_of

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
        BenchmarkError: if a row is not JSON, or the file is damaged or too large.
        PromptError: with all other bad rows.
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

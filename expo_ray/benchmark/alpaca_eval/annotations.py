"""Read AlpacaEval's annotations: a judge's preference between a baseline's and a model's answer to each of the 805 prompts."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expo_ray.benchmark.answer_checks import Answer
from expo_ray.benchmark.judges.verdicts import Verdicts
from expo_ray.benchmark.row_files import first_places, is_number, read_row_file
from expo_ray.errors import BenchmarkError, Problems
from expo_ray.text import shown

log = logging.getLogger("expo_ray")

_SUFFIX = re.compile(r"(?:\.jsonl?)?(?:\.gz)?$")
_PREFERENCE = "not a `preference` from 1 (the baseline is better) to 2 (the model is), or null"
# A judge sometimes fails to answer. Above this share, the prompts without a verdict could move the win rate by a point.
_MOST_UNPARSED = 0.02


@dataclass(frozen=True)
class Annotations:
    """The verdicts and texts of one file of annotations.

    Attributes:
        verdicts: a row for each annotation.
        answers: the model's, where the file holds texts.
        baseline: the baseline's, where the file holds texts.
    """

    verdicts: Verdicts
    answers: tuple[Answer, ...]
    baseline: tuple[Answer, ...]


@dataclass
class _Placed:
    """The rows of a file, sorted by usability.

    Attributes:
        rows: usable rows with their place in the file, by place in the list of prompts.
        present: places in the list of prompts that the file has a row for, usable or not.
        wrong: faults, each with the places in the file where it occurs.
    """

    rows: dict[int, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    present: set[int] = field(default_factory=set)
    wrong: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def read_annotations(uri: str, prompts: Sequence[str], *, allow_missing: bool = False) -> Annotations:
    """Read annotations and place them by instruction.

    Args:
        uri: annotations.json, or JSON lines with `instruction`, `preference` (1 to 2, 0 as another 1.5, or null) and `output_1` and
            `output_2` or their lengths `len_1` and `len_2`.
        prompts: the canonical list of instructions.
        allow_missing: accept a file that has no verdict on some prompts.

    Raises:
        Problems: with every fault of the file.
        StorageError: if it cannot be read.
    """
    file = read_row_file(uri)
    placed = _place(file.rows, {prompt: at for at, prompt in enumerate(prompts)})
    problems = [*file.problems]
    problems += [
        BenchmarkError(f"{uri}: {first_places(where)}: {what}") for what, where in placed.wrong.items()
    ]
    names, more = _names_of(file.rows, uri)
    problems += more
    model = names.get("generator_2") or _SUFFIX.sub("", uri.rpartition("/")[2])
    if not allow_missing:
        problems += _incomplete(model, placed, prompts)
    if problems:
        raise Problems(problems)
    verdicts = _verdicts(model, names, placed)
    if verdicts.unparsed:
        log.warning(
            "%s: %d of %d annotations hold no verdict", shown(model), verdicts.unparsed, len(placed.rows)
        )
    return Annotations(verdicts, _answers(placed, "output_2"), _answers(placed, "output_1"))


def _place(rows: Sequence[tuple[str, Mapping[str, Any]]], place_of: Mapping[str, int]) -> _Placed:
    placed = _Placed()
    for where, row in rows:
        instruction = row.get("instruction")
        if isinstance(instruction, str) and instruction in place_of:
            placed.present.add(place_of[instruction])
        if not isinstance(instruction, str):
            placed.wrong["no `instruction`; each row needs that text"].append(where)
        elif instruction not in place_of:
            placed.wrong[
                "an instruction that is not in the list of prompts; remove the row, or give the list it belongs to "
                "with --covariates"
            ].append(f"{where} ({instruction[:40]!r})")
        elif fault := _fault_of(row):
            placed.wrong[fault].append(
                f"{where} ({shown(row.get('preference'), 40)})" if fault == _PREFERENCE else where
            )
        elif place_of[instruction] in placed.rows:
            earlier, other = placed.rows[place_of[instruction]]
            same = _sizes(row) == _sizes(other) and row.get("output_2") == other.get("output_2")
            what = (
                "the same instruction twice"
                if same
                else "two answer sets: the same instruction with another answer"
            )
            placed.wrong[f"{what}; keep one row for each instruction"].append(f"{earlier} and {where}")
        else:
            placed.rows[place_of[instruction]] = where, row
    return placed


def _fault_of(row: Mapping[str, Any]) -> str:
    preference = row.get("preference", "missing")
    if preference is not None and not (is_number(preference) and (1 <= preference <= 2 or preference == 0)):
        return _PREFERENCE
    if None in _sizes(row):
        return "neither texts in `output_1` and `output_2` nor their lengths, in characters, in `len_1` and `len_2`"
    return ""


def _sizes(row: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Lengths of both answers in characters, as alpaca-eval counts them."""
    return _size(row.get("output_1"), row.get("len_1")), _size(row.get("output_2"), row.get("len_2"))


def _size(text: object, size: object) -> int | None:
    if isinstance(text, str):
        return len(text)
    return int(size) if is_number(size) and 0 <= size < 10**7 and size == int(size) else None


def _names_of(
    rows: Sequence[tuple[str, Mapping[str, Any]]], uri: str
) -> tuple[dict[str, str], list[BenchmarkError]]:
    """The model, baseline and judge that the rows name, and a problem for each that differs between rows."""
    names, problems = {}, []
    for key, what in (("generator_2", "answer sets"), ("generator_1", "baselines"), ("annotator", "judges")):
        seen = Counter(str(row[key]) for _, row in rows if row.get(key))
        if len(seen) > 1:
            problems.append(
                BenchmarkError(
                    f"{uri}: {'two' if len(seen) == 2 else len(seen)} {what}: {first_places(seen)}; give a file for each"
                )
            )
        names[key] = next(iter(seen), "")
    return names, problems


def _incomplete(model: str, placed: _Placed, prompts: Sequence[str]) -> list[BenchmarkError]:
    missing = [str(at) for at in range(len(prompts)) if at not in placed.present]
    unparsed = [where for where, row in placed.rows.values() if row["preference"] is None]
    remedy = "--allow-missing scores the others"
    problems = []
    if missing:
        problems.append(
            BenchmarkError(
                f"{shown(model)}: no annotation for {len(missing)} of {len(prompts)} prompts (prompt {first_places(missing)}, "
                f"counted from 0), so that the score is not the benchmark's; {remedy}"
            )
        )
    if len(unparsed) > _MOST_UNPARSED * len(prompts):
        problems.append(
            BenchmarkError(
                f"{shown(model)}: no verdict in {len(unparsed)} of {len(placed.rows)} annotations ({first_places(unparsed)}), more than "
                f"{_MOST_UNPARSED:.0%}; {remedy}"
            )
        )
    return problems


def _verdicts(model: str, names: Mapping[str, str], placed: _Placed) -> Verdicts:
    index = sorted(placed.rows)
    rows = [placed.rows[at][1] for at in index]
    sizes = np.array([_sizes(row) for row in rows], np.float64).reshape(-1, 2)
    return Verdicts(
        model,
        names["generator_1"],
        names["annotator"],
        index=np.array(index, np.int64),
        wins=np.array([_win(row["preference"]) for row in rows], np.float64),
        lengths=sizes[:, 1],
        opponent_lengths=sizes[:, 0],
    )


def _answers(placed: _Placed, key: str) -> tuple[Answer, ...]:
    rows = (row for _, row in placed.rows.values())
    return tuple(Answer(row["instruction"], row[key]) for row in rows if isinstance(row.get(key), str))


def _win(preference: float | None) -> float:
    if preference is None:
        return math.nan
    return 0.5 if preference == 0 else preference - 1  # alpaca-eval takes 0 for a draw

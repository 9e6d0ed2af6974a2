"""Load AlpacaEval's list of prompts and the covariates of its length control (df_gamed.csv)."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from expo_ray.benchmark.alpaca_eval.length_control import GamedRows, LengthControl
from expo_ray.benchmark.row_files import is_number, read_row_file, read_unpacked
from expo_ray.errors import BenchmarkError, ExpoError, Problems, problems_of
from expo_ray.evaluation.statistics import Array
from expo_ray.storage import join_uri, open_store
from expo_ray.text import shown

log = logging.getLogger("expo_ray")

# The only judge whose verdicts df_gamed.csv holds, as alpaca-eval's configurations and files call it, and its baseline.
OFFICIAL_JUDGES = ("weighted_alpaca_eval_gpt4_turbo",)
OFFICIAL_BASELINE = "gpt4_1106_preview"
# `gpt4_turbo` is alpaca-eval's first name for the same outputs.
_OFFICIAL_BASELINES = (OFFICIAL_BASELINE, "gpt4_turbo")
_REPOSITORY = "tatsu-lab/alpaca_eval"
_GAMED = ("df_gamed.csv", "df_gamed.reconstructed.csv")
_PROMPTS = ("prompts.jsonl", "prompts.jsonl.gz", "alpaca_eval.json")
_SHA256 = {"df_gamed.csv": "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"}
_NUMBERS = ("preference", "index", "std_delta_len", "instruction_difficulty")


@dataclass(frozen=True, eq=False)
class Covariates:
    """AlpacaEval's prompts, and the covariates of its length control.

    Attributes:
        prompts: the instructions in their canonical order, all different.
        difficulty: (prompts,), alpaca-eval's difficulty of each prompt.
        gamed: GPT-4-1106's verdicts on its concise and verbose answers.
        gamed_csv: bytes of df_gamed.csv, for alpaca-eval's own fit.
    """

    prompts: tuple[str, ...]
    difficulty: Array
    gamed: GamedRows
    gamed_csv: bytes

    @property
    def official(self) -> LengthControl:
        """The length control of GPT-4-1106's annotations against its own answers."""
        return LengthControl("official", self.difficulty, self.gamed)


def load_covariates(folder: str | None) -> Covariates:
    """Read the covariates of a folder, or download those of the Hub.

    Args:
        folder: holds `df_gamed.csv` or `df_gamed.reconstructed.csv`, and `prompts.jsonl`, `prompts.jsonl.gz` or
            `alpaca_eval.json`; None for `datasets/tatsu-lab/alpaca_eval` of the Hub.

    Raises:
        Problems: with every fault of both files.
        StorageError: if the folder cannot be read.
    """
    gamed_file, prompts_file = _files_of(folder) if folder else _download_both()
    problems: list[ExpoError] = []
    try:
        prompts = _read_prompts(prompts_file)
    except ExpoError as error:
        problems += problems_of(error)
        prompts = ()
    try:
        data = read_unpacked(gamed_file)
        gamed, difficulty = _read_gamed(data, gamed_file, len(prompts))
    except ExpoError as error:
        raise Problems([*problems, *problems_of(error)]) from error
    if problems:
        raise Problems(problems)
    _check_digest(gamed_file, data)
    return Covariates(prompts, difficulty, gamed, data)


def is_official(judge: str, baseline: str) -> bool:
    """True if the official length control is right for annotations; a file that names neither judge nor baseline counts as official."""
    return (not judge or judge in OFFICIAL_JUDGES) and (not baseline or baseline in _OFFICIAL_BASELINES)


def _files_of(folder: str) -> tuple[str, str]:
    keys = {info.key for info in open_store(folder).list()}
    chosen = [next((name for name in names if name in keys), None) for names in (_GAMED, _PROMPTS)]
    problems = [
        BenchmarkError(
            f"{folder}: holds no {' or '.join(names)}; put it there, or leave out --covariates to download it"
        )
        for names, name in zip((_GAMED, _PROMPTS), chosen, strict=True)
        if name is None
    ]
    if problems:
        raise Problems(problems)
    return join_uri(folder, str(chosen[0])), join_uri(folder, str(chosen[1]))


def _download_both() -> tuple[str, str]:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(_REPOSITORY, _GAMED[0], repo_type="dataset"), hf_hub_download(
            _REPOSITORY, "alpaca_eval.json", repo_type="dataset"
        )
    except (
        Exception
    ) as error:  # huggingface_hub lets errors of its HTTP client and of the file system through
        raise BenchmarkError(
            f"datasets/{_REPOSITORY}: cannot be downloaded from the Hub ({shown(f'{type(error).__name__}: {error}')}); "
            f"give a folder with {_GAMED[0]} and alpaca_eval.json as --covariates"
        ) from error


def _read_prompts(uri: str) -> tuple[str, ...]:
    file = read_row_file(uri)
    problems = list(file.problems)
    nameless = [place for place, row in file.rows if not isinstance(row.get("instruction"), str)]
    if nameless:
        problems.append(
            BenchmarkError(f"{uri}: {len(nameless)} row(s) without `instruction`; give the list of prompts")
        )
    rows = [row for _, row in file.rows if isinstance(row.get("instruction"), str)]
    if all(type(row.get("index")) is int for row in rows):
        if sorted(row["index"] for row in rows) != list(range(len(rows))):
            problems.append(
                BenchmarkError(
                    f"{uri}: `index` does not count from 0 to {len(rows) - 1}; give the whole list"
                )
            )
        rows.sort(key=lambda row: row["index"])
    prompts = tuple(row["instruction"] for row in rows)
    if len(set(prompts)) < len(prompts):
        problems.append(
            BenchmarkError(
                f"{uri}: {len(prompts) - len(set(prompts))} instruction(s) come twice; give each once"
            )
        )
    if problems:
        raise Problems(problems)
    return prompts


def _read_gamed(data: bytes, uri: str, num_prompts: int) -> tuple[GamedRows, Array]:
    remedy = "download df_gamed.csv again"
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"))))
        table = {name: np.array([float(row[name]) for row in rows]) for name in _NUMBERS}
        if not rows:
            raise ValueError("no rows")
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise BenchmarkError(
            f"{uri}: not alpaca-eval's table of {', '.join(_NUMBERS)} ({shown(error)}); {remedy}"
        ) from error
    problems = list(_faults_of_gamed(table, num_prompts))
    if problems:
        raise Problems([BenchmarkError(f"{uri}: {problem}; {remedy}") for problem in problems])
    difficulty = np.zeros(num_prompts)
    if num_prompts:  # else the list of prompts is wrong, and the table cannot be held against it
        difficulty[table["index"].astype(np.int64)] = table["instruction_difficulty"]
    return GamedRows(table["std_delta_len"], table["instruction_difficulty"], table["preference"]), difficulty


def _faults_of_gamed(table: Mapping[str, Array], num_prompts: int) -> Iterable[str]:
    bad = [name for name, column in table.items() if not all(map(is_number, column.tolist()))]
    if bad:
        yield f"values that are no numbers in {', '.join(bad)}"
        return
    if not ((table["preference"] >= 0) & (table["preference"] <= 1)).all():
        yield "a preference outside 0 to 1"
    if num_prompts and sorted(set(table["index"].tolist())) != list(range(num_prompts)):
        yield f"its index does not count through the {num_prompts} prompts"
    if len(set(zip(table["index"].tolist(), table["instruction_difficulty"].tolist(), strict=True))) != len(
        set(table["index"].tolist())
    ):
        yield "two difficulties for one prompt"


def _check_digest(uri: str, data: bytes) -> None:
    name = uri.rpartition("/")[2]
    digest = hashlib.sha256(data).hexdigest()
    if digest != _SHA256.get(name, digest):
        log.warning(
            "%s: sha256 %s, not the %s of the published file: length-controlled win rates may differ from the leaderboard's",
            shown(uri), digest, _SHA256[name],
        )  # fmt: skip
    elif name not in _SHA256:
        log.warning(
            "%s: not the published df_gamed.csv; length-controlled win rates may differ by a few hundredths",
            shown(uri),
        )

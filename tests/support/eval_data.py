"""Files of judgments for tests: real ones beside the checkout, and small ones made on the spot."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.paths import SHARED

# Real outputs, judgments and published scores; their licences keep them out of the repository.
DATA = SHARED / "data" / "eval"


def real_data(name: str) -> Path:
    """A folder of the real data; skips the test where it is missing."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: published scores are not computed again")
    return folder


def read_jsonl_gz(file: Path) -> list[dict[str, Any]]:
    """The rows of a packed JSONL file. Not splitlines(): texts hold U+2028."""
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().split("\n") if line]


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_covariates(folder: Path, num_prompts: int = 40) -> Path:
    """A small benchmark: prompts.jsonl in another order than its index, and a df_gamed.csv of a judge who likes length."""
    generator = np.random.default_rng(3)
    rows = [{"index": at, "instruction": f"Question {at}?"} for at in range(num_prompts)]
    write_jsonl(folder / "prompts.jsonl", [rows[at] for at in generator.permutation(num_prompts)])
    difficulty = generator.normal(0, 1, num_prompts)
    with (folder / "df_gamed.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ["model", "preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]
        )
        for model, sign in (("concise", 1), ("verbose", -1)):
            for at in range(num_prompts):
                delta = sign * generator.uniform(0.5, 2)
                odds = -1.5 * np.tanh(delta) + difficulty[at]
                table.writerow([model, 1 / (1 + np.exp(-odds)), at, delta, difficulty[at], False])
    return folder


def make_annotations(num_prompts: int = 40, seed: int = 0, **columns: Any) -> list[dict[str, Any]]:
    """Rows for the prompts of `make_covariates`, with the same extra columns in each."""
    generator = np.random.default_rng(seed)
    return [
        {
            "instruction": f"Question {at}?",
            "preference": float(generator.uniform(1, 2)),
            "len_1": int(generator.integers(100, 900)),
            "len_2": int(generator.integers(100, 900)),
            **columns,
        }
        for at in range(num_prompts)
    ]


def make_ratings(
    model: str, questions: Sequence[int] = range(81, 161), **columns: Any
) -> list[dict[str, Any]]:
    """FastChat's single-answer ratings: 7 for the first turns, 5 for the second."""
    return [
        {
            "question_id": question,
            "model": model,
            "judge": ["judge", "single-v1"],
            "user_prompt": f"{question} {turn}",
            "judgment": "",
            "score": 7 if turn == 1 else 5,
            "turn": turn,
            **columns,
        }
        for turn in (1, 2)
        for question in questions
    ]

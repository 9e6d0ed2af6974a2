"""Tables of benchmark results as Markdown, JSON and a page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from expo_ray.benchmark.alpaca_eval.length_control import LengthControl
from expo_ray.benchmark.alpaca_eval.win_rates import compare_arms, score_arm
from expo_ray.benchmark.head_to_head import HeadToHead, head_to_head
from expo_ray.benchmark.judges.verdicts import Verdicts
from expo_ray.benchmark.tables import (
    arms_table,
    differences_forest,
    differences_table,
    head_to_head_forest,
    head_to_head_json,
    head_to_head_table,
    markdown,
    pooled_head_to_head,
)
from expo_ray.cli.process import main
from expo_ray.report.benchmark_page import Table, benchmark_page
from tests.support.eval_data import make_annotations, write_jsonl

HOSTILE = "<script>alert(1)</script>|\u202e\x1b[31m$x$"


def duel(shift: float, seed: int, model: str = "expo", number: int = 200) -> HeadToHead:
    generator = np.random.default_rng(seed)
    lengths, opponent = generator.integers(100, 900, (2, number)).astype(np.float64)
    wins = np.clip(generator.uniform(0, 1, number) + shift, 0, 1)
    index = np.arange(number, dtype=np.int64)
    return head_to_head(Verdicts(model, "dpo", "judge", index, wins, lengths, opponent))


def cells(table: Table, row: int) -> dict[str, str]:
    return dict(zip(table.columns, table.rows[row], strict=True))


def test_head_to_head_is_adjusted_over_pairs_and_pooled() -> None:
    duels = [duel(0.2, 1, "a"), duel(0.0, 2, "b"), duel(-0.2, 3, "c"), duel(0.045, 4, "d")]
    table = head_to_head_table(duels)
    assert [cells(table, at)["at 5 %"] for at in range(3)] == ["better", "inconclusive", "worse"]
    result = head_to_head_json(duels)
    for pair, each in zip(result["pairs"], duels, strict=True):
        assert each.p_value <= pair["p_holm"] <= min(1, 4 * each.p_value)
    assert len(table.rows) == 5
    mean = np.mean([each.controlled.interval.mean for each in duels])
    assert result["pooled"]["value"] == pytest.approx(mean)
    json.dumps(result, allow_nan=False)


def test_pairs_on_different_numbers_of_prompts_have_no_pooled_row() -> None:
    duels = [duel(0.2, 1), duel(0.1, 2, number=150)]
    assert pooled_head_to_head(duels) is None
    assert len(head_to_head_table(duels).rows) == 2


def test_official_figures_share_no_column_with_others() -> None:
    generator = np.random.default_rng(0)
    lengths, opponent = generator.integers(100, 900, (2, 60)).astype(np.float64)
    index = np.arange(60, dtype=np.int64)
    arm = Verdicts("model", "gpt4", "judge", index, generator.uniform(0, 1, 60), lengths, opponent)
    control = LengthControl("none", generator.normal(0, 1, 60), None)
    scores = [score_arm(arm, control), replace(score_arm(arm, control), control="official")]
    table = arms_table(scores, "judge")
    filled = [[bool(row[at]) for at in (2, 3)] for row in table.rows]
    assert sorted(filled) == [[False, True], [True, False]]
    assert len(set(table.columns)) == len(table.columns)
    difference = compare_arms(scores[0], scores[0], control)
    assert cells(differences_table([difference]), 0)["at 5 %"] == "inconclusive"
    assert len(differences_forest([difference, difference]).rows) == 3


def test_markdown_keeps_its_columns_whatever_a_name_holds() -> None:
    text = markdown([head_to_head_table([duel(0, 1, "a|b\nc")])])
    lines = [line for line in text.split("\n") if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_the_page_shows_every_row_and_nothing_of_a_name_is_markup() -> None:
    duels = [duel(0.2, 1, HOSTILE), duel(-0.2, 2, "other")]
    page = benchmark_page("Results", [head_to_head_table(duels)], [head_to_head_forest(duels)])
    assert "<script" not in page
    assert "\x1b" not in page
    assert not re.search(r"(?:src|href)=\"(?!#|data:,)", re.sub(r'xmlns[:\w]*="[^"]*"', "", page))
    svg = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    assert svg is not None
    drawn = "".join(ElementTree.fromstring(svg[0]).itertext())
    assert "mean of 2 pairs" in drawn
    assert page.count("<tr>") == 4
    assert page == benchmark_page("Results", [head_to_head_table(duels)], [head_to_head_forest(duels)])


def pair_file(folder: Path, name: str, seed: int, rows: slice = slice(None), judge: str = "judge") -> Path:
    names: dict[str, Any] = {"generator_1": f"{name} dpo", "generator_2": name, "annotator": judge}
    return write_jsonl(folder / f"{name}.jsonl", make_annotations(seed=seed, **names)[rows])


def test_several_pairs_make_one_table_and_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shuffled = slice(None, None, -1)
    files = [
        pair_file(tmp_path, "a", 1),
        pair_file(tmp_path, "b", 2, shuffled),
        pair_file(tmp_path, "c", 3, slice(5, None)),
    ]
    words = [
        "benchmark",
        "pairs",
        "--annotations",
        *map(str, files),
        "--output",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert [(pair["model"], pair["reference"], pair["n"]) for pair in result["pairs"]] == [
        ("a", "a dpo", 35), ("b", "b dpo", 35), ("c", "c dpo", 35)
    ]  # fmt: skip
    mean = np.mean([pair["length_controlled_winrate"]["value"] for pair in result["pairs"]])
    assert result["pooled"]["value"] == pytest.approx(mean)
    assert "35 prompts" in caplog.text
    page = (tmp_path / "out" / "pairs.html").read_text()
    assert "mean of 3 pairs" in page
    assert (tmp_path / "out" / "pairs.md").read_text().count("\n| ") == 5


def test_pairs_of_several_judges_or_models_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [pair_file(tmp_path, "a", 1), pair_file(tmp_path, "b", 2, judge="another")]
    mixed = write_jsonl(
        tmp_path / "mixed.jsonl",
        [
            {**row, "annotator": "judge", "generator_2": f"model {at % 2}"}
            for at, row in enumerate(make_annotations())
        ],
    )
    output = tmp_path / "out"
    words = ["benchmark", "pairs", "--annotations", *map(str, [*files, mixed]), "--output", str(output)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("2 problem(s)")
    assert not output.exists()

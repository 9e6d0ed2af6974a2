"""Scores of judgments that exist: published figures computed again, and files that are wrong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from expo_ray.benchmark.alpaca_eval.annotations import read_annotations
from expo_ray.benchmark.alpaca_eval.covariates import Covariates, load_covariates
from expo_ray.benchmark.alpaca_eval.length_control import controlled_win_rate
from expo_ray.benchmark.alpaca_eval.package_fit import package_win_rates
from expo_ray.benchmark.alpaca_eval.win_rates import score_arm
from expo_ray.benchmark.judges.verdicts import Verdicts
from expo_ray.cli.process import main
from expo_ray.errors import Problems
from tests.support.eval_data import (
    make_annotations,
    make_covariates,
    make_ratings,
    real_data,
    write_jsonl,
)

# alpaca-eval takes ten seconds to import, and much longer beside engines.
pytestmark = pytest.mark.timeout(1200)

Rows = list[dict[str, Any]]
INCOMPLETE = {
    "alpaca-7b_concise": 804,
    "alpaca-7b_verbose": 802,
    "minotaur-13b": 804,
    "text_davinci_001": 803,
}


def real_annotations(folder: Path, covariates: Covariates, out: Path) -> dict[str, Path]:
    """A file of annotations for each stored model, its rows in another order than the prompts."""
    pytest.importorskip("pyarrow")
    import pandas as pd

    files = {}
    for model, rows in pd.read_parquet(folder / "preferences.parquet").groupby("model"):
        columns = zip(rows["index"], rows.preference, rows.len_1, rows.len_2, strict=True)
        lines = [
            {"instruction": covariates.prompts[at], "preference": preference, "len_1": len_1, "len_2": len_2}
            for at, preference, len_1, len_2 in columns
        ]
        random.Random(model).shuffle(lines)
        files[str(model)] = write_jsonl(out / f"{model}.jsonl", lines)
    return files


def columns_of(arm: Verdicts) -> dict[str, Any]:
    sizes = {"len_1": arm.opponent_lengths, "len_2": arm.lengths}
    return {
        "index": arm.index.tolist(),
        "preference": (arm.wins + 1).tolist(),
        **{name: size.astype(int).tolist() for name, size in sizes.items()},
    }


def win_rate(covariates: Covariates, arm: Verdicts) -> float:
    return float(controlled_win_rate(arm, covariates.official)(np.ones((1, len(arm.index))))[0])


def test_published_alpaca_eval_scores_are_computed_again_whatever_the_order_of_rows(tmp_path: Path) -> None:
    folder = real_data("alpaca")
    import pandas as pd

    expected = pd.read_csv(folder / "expected.csv").set_index("model")
    covariates = load_covariates(str(folder))
    arms: dict[str, Verdicts] = {}
    refused = {}
    for model, file in real_annotations(folder, covariates, tmp_path).items():
        try:
            arms[model] = read_annotations(str(file), covariates.prompts).verdicts
        except Problems as error:
            refused[model] = str(error)
    assert refused.keys() == INCOMPLETE.keys()
    assert all(model in text for model, text in refused.items())
    assert len(arms) == 30
    for model, arm in arms.items():
        assert 100 * arm.wins.mean() == pytest.approx(expected.win_rate[model], abs=1e-6)
    del arms["gpt4_1106_preview"]  # against itself, which the package cannot fit
    official = package_win_rates([columns_of(arm) for arm in arms.values()], covariates.gamed_csv)
    for (model, arm), value in zip(arms.items(), official, strict=True):
        assert value == pytest.approx(expected.length_controlled_winrate[model], abs=0.2), model
        # Intervals rest on our own fit.
        assert win_rate(covariates, arm) == pytest.approx(value, abs=0.15), model


def test_incomplete_sets_are_scored_by_instruction_when_asked_for(tmp_path: Path) -> None:
    folder = real_data("alpaca")
    covariates = load_covariates(str(folder))
    files = real_annotations(folder, covariates, tmp_path)
    for model, number in INCOMPLETE.items():
        arm = read_annotations(str(files[model]), covariates.prompts, allow_missing=True).verdicts
        assert len(arm.index) == number
        assert np.all(np.diff(arm.index) > 0)
    # The published figure, 11.465, joined the difficulties by the row's place from the missing row on.
    arm = read_annotations(str(files["minotaur-13b"]), covariates.prompts, allow_missing=True).verdicts
    assert win_rate(covariates, arm) == pytest.approx(9.03, abs=0.05)


def alpaca(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["benchmark", "alpaca", "--json", *map(str, words)]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_covariates(tmp_path_factory.mktemp("covariates"))


def test_the_command_scores_one_file_and_writes_nothing_anywhere(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    package = next(Path(path, "alpaca_eval") for path in sys.path if Path(path, "alpaca_eval").is_dir())
    before = {file: file.stat().st_mtime_ns for file in package.rglob("*")}
    rows = make_annotations()
    score = alpaca(capsys, "--annotations", write_jsonl(tmp_path / "a.jsonl", rows), "--covariates", small)
    assert {file: file.stat().st_mtime_ns for file in package.rglob("*")} == before
    assert list(home.iterdir()) == []
    assert score.keys() == {"win_rate", "length_controlled_winrate", "intervals", "n", "unparsed"}
    assert score["win_rate"] == pytest.approx(100 * np.mean([row["preference"] - 1 for row in rows]))
    assert (score["n"], score["unparsed"]) == (40, 0)
    for name, (low, high) in score["intervals"].items():
        assert low < score[name] < high
    shuffled = random.Random(1).sample(rows, len(rows))
    texts = [
        {**row, "output_1": "x" * row.pop("len_1"), "output_2": "y" * row.pop("len_2")} for row in shuffled
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(texts))
    again = alpaca(capsys, "--annotations", tmp_path / "annotations.json", "--covariates", small)
    assert again == score


def test_a_baseline_against_itself_scores_fifty(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "preference": 1.5, "len_2": row["len_1"]} for row in make_annotations()]
    score = alpaca(capsys, "--annotations", write_jsonl(tmp_path / "a.jsonl", rows), "--covariates", small)
    assert score["win_rate"] == score["length_controlled_winrate"] == 50


def test_two_files_give_a_paired_difference(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_annotations()
    better = [{**row, "preference": min(row["preference"] + 0.1, 2)} for row in rows]
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", each) for name, each in (("dpo", rows), ("expo", better))
    ]
    result = alpaca(capsys, "--annotations", *files, "--covariates", small)
    difference = result["difference"]
    assert (difference["model"], difference["reference"]) == ("expo", "dpo")
    for name in ("win_rate", "length_controlled_winrate"):
        change = result["models"]["expo"][name] - result["models"]["dpo"][name]
        low, high = difference[name]["interval"]
        # The package chooses its penalty for each model anew; differences are ours.
        assert difference[name]["value"] == pytest.approx(change, abs=0.5)
        assert low < difference[name]["value"] < high
        # Prompts vary much more than the change on each: only paired resampling sees that.
        arm_low, arm_high = result["models"]["expo"]["intervals"][name]
        assert high - low < (arm_high - arm_low) / 3


@pytest.mark.parametrize("columns", [{"annotator": "other judge"}, {"generator_1": "text_davinci_003"}])
def test_another_judge_or_baseline_gets_no_official_length_control(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, Any]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_annotations(**columns))
    score = alpaca(capsys, "--annotations", file, "--covariates", small)
    assert score["length_controlled_winrate"] is None
    assert score["win_rate"] > 0


def changed(**values: Any) -> Callable[[Rows], Rows]:
    return lambda rows: [{**rows[0], **values}, *rows[1:]]


BAD: dict[str, Callable[[Rows], Rows]] = {
    "dropped": lambda rows: rows[1:],
    "duplicated": lambda rows: [*rows, rows[3]],
    "another answer": lambda rows: [*rows, {**rows[3], "len_2": 1}],
    "NaN": changed(preference=float("nan")),
    "infinite": changed(preference=float("inf")),
    "2.7": changed(preference=2.7),
    "0.5": changed(preference=0.5),
    "a word": changed(preference="2"),
    "true": changed(preference=True),
    "no preference": lambda rows: [{key: row[key] for key in row if key != "preference"} for row in rows],
    "unknown instruction": changed(instruction="Question 40?"),
    "no instruction": changed(instruction=None),
    "a space more": changed(instruction="Question 0? "),
    "no lengths": changed(len_2=None),
    "negative length": changed(len_2=-1),
    "many without a verdict": lambda rows: [{**row, "preference": None} for row in rows[:2]] + rows[2:],
    "two models": lambda rows: [{**row, "generator_2": f"model {at % 2}"} for at, row in enumerate(rows)],
    "two judges": lambda rows: [{**row, "annotator": f"judge {at % 2}"} for at, row in enumerate(rows)],
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_file_is_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", BAD[name](make_annotations()))
    assert main(["benchmark", "alpaca", "--annotations", str(file), "--covariates", str(small)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n\n",
        b"not JSON",
        b"[1, 2",
        b"{}",
        b"[]",
        b"null",
        b"[[]]",
        b"\xff\xfe",
        b"\x1f\x8bcut",
        b"[" * 9999,
    ],
)
def test_a_file_that_holds_no_rows_is_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    file = tmp_path / "annotations.json"
    file.write_bytes(data)
    assert main(["benchmark", "alpaca", "--annotations", str(file), "--covariates", str(small)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_every_problem_is_reported_at_once(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_annotations()
    rows = [*rows[2:], rows[5], {**rows[0], "preference": 2.7}, {**rows[1], "instruction": "Who?"}]
    first = write_jsonl(tmp_path / "first.jsonl", rows)
    first.write_text(first.read_text() + "{]\n")
    second = tmp_path / "second.jsonl"
    second.write_text("")
    words = ["benchmark", "alpaca", "--annotations", str(first), str(second), "--covariates", str(small)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("6 problem(s)")
    for value in (
        "2.7",
        "Who?",
        "line 42",
        "twice",
        "first: no annotation for 1 of 40 prompts (prompt 1,",
        "second.jsonl",
    ):
        assert value in error


def test_a_few_rows_without_a_verdict_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = make_annotations(60)
    rows[7]["preference"] = None
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    arm = read_annotations(str(file), [f"Question {at}?" for at in range(60)]).verdicts
    score = score_arm(arm, None)
    assert (len(score.verdicts.index), score.unparsed) == (59, 1)
    kept = [row["preference"] - 1 for row in rows if row["preference"] is not None]
    assert score.win_rate.interval.mean == pytest.approx(100 * np.mean(kept))
    assert "1 of 60" in caplog.text


def test_texts_with_line_separators_and_half_surrogates_are_counted_in_characters(
    small: Path, tmp_path: Path
) -> None:
    rows = make_annotations()
    del rows[0]["len_1"], rows[0]["len_2"]
    rows[0] |= {"output_1": "a\u2028b\u0085c", "output_2": "\ud800 \U0001f600"}
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    arm = read_annotations(str(file), load_covariates(str(small)).prompts).verdicts
    assert (arm.opponent_lengths[0], arm.lengths[0]) == (5, 3)


def test_all_problems_of_a_list_are_reported_though_it_holds_a_nan(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_annotations(raw_completion=float("nan"))
    file = tmp_path / "annotations.json"
    file.write_text("\ufeff" + json.dumps([{**rows[0], "preference": float("nan")}, *rows[2:], rows[3]]))
    assert main(["benchmark", "alpaca", "--annotations", str(file), "--covariates", str(small)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("3 problem(s)")
    for value in ("row 1", "nan", "row 3 and row 40", "1 of 40 prompts"):
        assert value in error


def test_a_wrong_list_of_prompts_is_reported_beside_a_wrong_table(tmp_path: Path) -> None:
    folder = make_covariates(tmp_path)
    (folder / "prompts.jsonl").write_text("{]\n")
    with pytest.raises(Problems, match="line 1") as single:
        load_covariates(str(folder))
    (folder / "df_gamed.csv").write_text("a,b\n")
    with pytest.raises(Problems, match="line 1") as both:
        load_covariates(str(folder))
    assert (len(single.value.problems), len(both.value.problems)) == (1, 2)


@pytest.mark.parametrize("missing", ["df_gamed.csv", "prompts.jsonl"])
def test_covariates_that_are_not_there_are_named(tmp_path: Path, missing: str) -> None:
    folder = make_covariates(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(Problems, match=missing):
        load_covariates(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("preference", "liking", 1),
        lambda text: text.replace(",", ";"),
        lambda text: text.replace("concise,0.", "concise,7.", 1),
        lambda text: text.replace("concise,0.", "concise,nan0.", 1),
        lambda text: "\n".join(text.split("\n")[:60]) + "\nverbose,0.5,99,1.0,0.0,False\n",
        lambda text: text.split("\n")[0],
    ],
)
def test_a_df_gamed_that_is_none_is_refused(tmp_path: Path, change: Callable[[str], str]) -> None:
    folder = make_covariates(tmp_path)
    file = folder / "df_gamed.csv"
    file.write_text(change(file.read_text()))
    with pytest.raises(Problems):
        load_covariates(str(folder))


def ratings(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["benchmark", "mtbench", "--json", "--judgments", *map(str, words)]) == 0
    models: dict[str, Any] = json.loads(capsys.readouterr().out)["models"]
    return models


def test_published_mt_bench_scores_are_computed_again(capsys: pytest.CaptureFixture[str]) -> None:
    file = real_data("mtbench") / "gpt-4_single.orpo.jsonl.gz"
    assert main(["benchmark", "mtbench", "--judgments", str(file)]) == 2
    error = capsys.readouterr().err
    assert "mistral-orpo: two answer sets" in error
    models = ratings(capsys, file, "--duplicates", "last")
    assert models["mistral-orpo"]["average"] == 6.328125
    mix = models["mistral-orpo-mix"]
    assert (mix["average"], mix["turn_1"], mix["turn_2"], mix["n"]) == (6.003125, 6.43125, 5.575, 160)


def test_a_rating_that_could_not_be_read_counts_in_no_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_ratings("model")
    rows[0]["score"] = rows[100]["score"] = -1
    model = ratings(capsys, write_jsonl(tmp_path / "single.jsonl", rows))["model"]
    assert (model["turn_1"], model["turn_2"], model["n"], model["unparsed"]) == (7, 5, 158, 2)
    assert model["average"] == pytest.approx((79 * 7 + 79 * 5) / 158)


def test_a_model_without_any_rating_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "single.jsonl", [*make_ratings("rated"), *make_ratings("mute", score=-1)])
    assert main(["benchmark", "mtbench", "--judgments", str(file)]) == 2
    assert "mute" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"score": float("nan")}, {"score": 11}, {"score": -2}, {"score": "7"}, {"score": None}, {"turn": 3}, {"turn": None},
        {"question_id": "81"}, {"model": None}, {"model": ""}, {"judge": ["another", "single-v1"]}, {"turn": [1]},
    ],
)  # fmt: skip
def test_a_wrong_rating_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    rows = make_ratings("model")
    rows[5] |= change
    file = write_jsonl(tmp_path / "single.jsonl", rows)
    assert main(["benchmark", "mtbench", "--judgments", str(file)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_two_models_are_compared_on_their_common_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = write_jsonl(tmp_path / "dpo.jsonl", make_ratings("dpo", range(81, 151)))
    second = write_jsonl(tmp_path / "expo.jsonl", make_ratings("expo", range(91, 161), score=8))
    assert main(["benchmark", "mtbench", "--json", "--judgments", str(first), str(second)]) == 0
    difference = json.loads(capsys.readouterr().out)["difference"]
    assert (difference["model"], difference["reference"], difference["questions"]) == ("expo", "dpo", 60)
    assert difference["average"]["value"] == 2
    assert "140 of the 160" in caplog.text


def leaderboard(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["benchmark", "leaderboard", "--json", "--results", *map(str, words)]) == 0
    models: dict[str, Any] = json.loads(capsys.readouterr().out)["models"]
    return models


def test_published_leaderboard_averages_are_computed_again(capsys: pytest.CaptureFixture[str]) -> None:
    published = {
        "tulu-2-dpo-7b": 57.90, "tulu-2-dpo-7b-ExPO": 58.71, "internlm2-chat-7b": 58.58, "internlm2-chat-7b-ExPO": 59.27,
        "internlm2-chat-1_8b": 47.64, "internlm2-chat-1_8b-ExPO": 47.63, "Snorkel-Mistral-PairRM-DPO": 65.76,
        "Snorkel-Mistral-PairRM-DPO-ExPO": 65.65,
    }  # fmt: skip
    models = leaderboard(capsys, real_data("lmeval"))
    assert {name: model["average"] for name, model in models.items()} == pytest.approx(published, abs=0.01)
    assert leaderboard(capsys, *(real_data("lmeval") / name for name in published)) == models


def new_results() -> dict[str, Any]:
    """A result file of lm-eval 0.4."""
    return {
        "results": {
            "arc_challenge": {"alias": "arc_challenge", "acc,none": 0.5, "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.01},
            "hellaswag": {"acc,none": 0.6, "acc_norm,none": 0.8},
            "mmlu": {"acc,none": 0.55},
            "mmlu_stem": {"acc,none": 0.1},
            "truthfulqa_mc2": {"acc,none": 0.4},
            "winogrande": {"acc,none": 0.7},
            "gsm8k": {"exact_match,strict-match": 0.3, "exact_match,flexible-extract": 0.35},
        },
        "n-shot": {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 8},
        "config": {"limit": None},
    }  # fmt: skip


def test_result_files_of_the_present_harness_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "model" / "org__model" / "results_2026-11-01T10-00-00.json"
    file.parent.mkdir(parents=True)
    results = new_results()
    file.write_text(json.dumps(results))
    (file.parent / "samples_gsm8k_2026.json").write_text("not read")
    assert leaderboard(capsys, tmp_path / "model")["model"] == pytest.approx(
        {"arc": 60, "hellaswag": 80, "mmlu": 55, "truthfulqa": 40, "winogrande": 70, "gsm8k": 30, "average": 55.833333333,
         "gsm8k_flexible": 35}
    )  # fmt: skip
    assert "8 examples" in caplog.text
    # All subjects: their mean counts, as on the leaderboard, and not the mean over questions.
    results["results"] |= {f"mmlu_subject_{at}": {"acc,none": 0.2 if at else 0.77} for at in range(57)}
    file.write_text(json.dumps(results))
    assert leaderboard(capsys, tmp_path / "model")["model"]["mmlu"] == pytest.approx(21)


def test_the_leaderboards_own_names_are_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {
        "results": {"harness|arc:challenge|25": {"acc_norm": 0.5}, "harness|truthfulqa:mc|0": {"mc2": 0.4}}
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    model = leaderboard(capsys, tmp_path)[tmp_path.name]
    assert (model["arc"], model["truthfulqa"], model["gsm8k"], model["average"]) == (50, 40, None, None)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"results": []}', '{"results": {"gsm8k": 1}}', '{"results": {"gsm8k": {"acc": NaN}}}',
     '{"results": {"gsm8k": {"acc": 31.0}}}', '{"results": {"gsm8k": {"acc": "0.3"}}}', '{"results": {"other": {"acc": 0.3}}}',
     '{"results": {"hendrycksTest-anatomy": {"acc": 0.3}}}'],
)  # fmt: skip
def test_a_file_without_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "gsm8k.json").write_text(text)
    assert main(["benchmark", "leaderboard", "--results", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_task_that_comes_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("results_1.json", "results_2.json"):
        (tmp_path / name).write_text(json.dumps(new_results()))
    assert main(["benchmark", "leaderboard", "--results", str(tmp_path), str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "results_1.json as well" in error
    assert str(tmp_path / "none") in error


@contextmanager
def dataset_server(folder: Path) -> Iterator[str]:
    """A Hub with one dataset, whose files are those of the folder; gives its address."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._file()

        def do_GET(self) -> None:
            self._file(body=True)

        def _file(self, *, body: bool = False) -> None:
            match = re.fullmatch(r"/datasets/tatsu-lab/alpaca_eval/resolve/\w+/([\w.]+)", self.path)
            data = (folder / match[1]).read_bytes() if match and (folder / match[1]).is_file() else b""
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_covariates_are_downloaded_and_another_digest_is_said(small: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "df_gamed.csv").write_bytes((small / "df_gamed.csv").read_bytes())
    rows = [json.loads(line) for line in (small / "prompts.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row.pop("index"))
    (hub / "alpaca_eval.json").write_text(json.dumps(rows))
    file = write_jsonl(tmp_path / "a.jsonl", make_annotations())
    with dataset_server(hub) as endpoint:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        command = [
            sys.executable,
            "-m",
            "expo_ray.cli",
            "benchmark",
            "alpaca",
            "--json",
            "--annotations",
            str(file),
        ]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["n"] == 40
    assert hashlib.sha256((hub / "df_gamed.csv").read_bytes()).hexdigest() in done.stderr

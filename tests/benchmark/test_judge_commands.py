"""`expo-ray benchmark` with a judge behind HTTP whose right result is known beforehand."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from expo_ray.benchmark.judges.ask_judge import PART_ROWS
from expo_ray.cli.process import main
from tests.support.judge_server import JudgeServer, judge_server, rating_of
from tests.support.paths import ROOT
from tests.support.ray_cluster import wait_until

EVAL = ROOT.parent / "shared" / "data" / "eval"
needs_data = pytest.mark.skipif(not EVAL.is_dir(), reason="../shared/data/eval is not there")
CONCURRENCY = 8


def written(path: Path, outputs: Mapping[str, str], name: str) -> Path:
    """A file of answers as alpaca-eval writes them."""
    rows = [
        {"instruction": key, "output": text, "generator": name, "dataset": "d"}
        for key, text in outputs.items()
    ]
    path.write_text(json.dumps(rows))
    return path


def few(tmp_path: Path, count: int = 6) -> list[Path]:
    """Answers of a baseline, of dpo and of a model whose answers are the longest."""
    texts = {
        "baseline": "a short answer {}",
        "dpo": "an answer {} of middling length",
        "expo": "the longest answer of all, number {}, and " + "some words more" * 30,
    }
    return [
        written(
            tmp_path / f"{name}.json",
            {f"question {number}": text.format(number) for number in range(count)},
            name,
        )
        for name, text in texts.items()
    ]


def judge(server: JudgeServer, *words: object, name: str = "alpaca") -> list[str]:
    """The words of a command."""
    return ["benchmark", name, *map(str, words), "--judge", server.url, "--judge-model", "judge", "--concurrency", str(CONCURRENCY)]  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    return summary


def test_two_files_of_answers_make_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline, dpo, expo = few(tmp_path)
    with judge_server("longer") as server:
        words = judge(server, "--outputs", expo, "--against", dpo, "--baseline", baseline, "--output", tmp_path / "out", "--length-control", "none")  # fmt: skip
        summary = printed(capsys, words)
        assert len(server.received) == 6 * 2 + 6 + 6
        assert main(words) == 0
        assert len(server.received) == 24
    assert summary["win_rate"] > summary["against"]["win_rate"] > 50
    assert summary["difference"]["win_rate"]["value"] == pytest.approx(
        summary["win_rate"] - summary["against"]["win_rate"]
    )
    duel = summary["head_to_head"]
    assert duel["win_rate"] == duel["pairs"][0]["win_rate"]["value"] > 50
    assert (duel["n"], duel["unparsed"]) == (6, 0)
    assert (summary["n"], summary["unparsed"], summary["length_controlled_winrate"]) == (6, 0, None)
    text = capsys.readouterr().out
    assert "No judge card" in text
    rows = json.loads((tmp_path / "out/annotations/expo-against-baseline.json").read_text())
    assert summary["win_rate"] == pytest.approx(sum(100 * (row["preference"] - 1) for row in rows) / 6)


def test_everything_wrong_with_the_files_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, dpo, expo = few(tmp_path)
    rows = json.loads(expo.read_text())
    expo.write_text(json.dumps([{**rows[0], "output": None}, rows[1], rows[1]]))
    dpo.write_text("not JSON")
    words = ["benchmark", "alpaca", "--outputs", str(expo), "--against", str(dpo), "--baseline", str(tmp_path / "none.json"),
             "--judge", "http://127.0.0.1:9/v1", "--judge-model", "judge", "--output", str(tmp_path / "out"), "--length-control", "none"]  # fmt: skip
    assert main(words) == 2
    text = capsys.readouterr().err
    assert all(name in text for name in ("expo.json", "dpo.json", "none.json", "row 1", "row 3"))
    assert not (tmp_path / "out").exists()


def test_an_incomplete_file_is_refused_or_its_own_rows_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, _, expo = few(tmp_path)
    expo.write_text(json.dumps(json.loads(expo.read_text())[:4]))
    with judge_server("longer") as server:
        words = judge(server, "--outputs", expo, "--baseline", baseline, "--output", tmp_path / "out", "--length-control", "none")  # fmt: skip
        assert main(words) == 2
        assert not server.received
        capsys.readouterr()
        assert printed(capsys, [*words, "--allow-missing"])["n"] == 4


def test_a_cost_is_known_before_and_not_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline, _, expo = few(tmp_path)
    with judge_server("coin") as server:
        words = judge(server, "--outputs", expo, "--baseline", baseline, "--output", tmp_path / "out", "--length-control", "none")  # fmt: skip
        assert main([*words, "--max-cost", "1"]) == 2
        assert "--price" in capsys.readouterr().err
        assert main([*words, "--price", "1000", "0", "--max-cost", "0.1"]) == 2
        assert not server.received
        # Some 400 tokens each, of which the largest cost of a request sets aside twice as many.
        assert main([*words, "--price", "1000", "0", "--max-cost", "2.8"]) == 1
        assert 0 < len(server.received) < 6
        assert main(words) == 0
        assert len(server.received) == 6


def test_a_judge_that_refuses_or_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expo_ray.benchmark.judges.ask_judge._ATTEMPTS", 2)
    baseline, _, expo = few(tmp_path)
    with judge_server("400") as server:
        words = judge(server, "--outputs", expo, "--baseline", baseline, "--output", tmp_path / "out", "--length-control", "none")  # fmt: skip
        assert main(words) == 1
        assert "this content is not judged" in capsys.readouterr().err
    assert main(words) == 1  # the server is gone
    with judge_server("garbage") as server:
        words = judge(server, "--outputs", expo, "--baseline", baseline, "--output", tmp_path / "out", "--length-control", "none", "--protocol", "verdict")  # fmt: skip
        assert main(words) != 0
    assert list((tmp_path / "out").rglob("*.jsonl"))


def test_a_key_reaches_its_judge_and_nothing_that_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_JUDGE", "sk-judge-canary-1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai-canary-2")
    baseline, _, expo = few(tmp_path)
    with judge_server("longer") as server:
        server.key = "sk-judge-canary-1"
        words = judge(server, "--outputs", expo, "--baseline", baseline, "--output", tmp_path / "out", "--length-control", "none")  # fmt: skip
        assert main(words) == 1
        assert "--key-env" in capsys.readouterr().err
        assert all("Authorization" not in headers for headers, _ in server.received)
        assert main([*words, "--key-env", "MY_JUDGE"]) == 0
    everything = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    captured = capsys.readouterr()
    assert "canary" not in everything + captured.out + captured.err


def test_a_card_says_how_far_a_judge_can_be_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, _, _ = few(tmp_path)
    # GPT-4, here, prefers the longer of two outputs for certain, and no judge likes an answer to another prompt by its length.
    rows = [
        {"instruction": f"question {number}", "output_1": "word " * (10 + number * 7 % 40), "output_2": "word " * (10 + number * 11 % 40),
         "preference": 1 + (number * 11 % 40 > number * 7 % 40)}
        for number in range(1, 40)
    ]  # fmt: skip
    reference = tmp_path / "annotations.json"
    reference.write_text(json.dumps(rows))
    cards = {}
    for mode in ("longer", "coin"):
        with judge_server(mode) as server:
            words = judge(server, "--reference", reference, "--output", tmp_path / "out" / mode, name="judge")
            cards[mode] = printed(capsys, words)
            asked = len(server.received)
            assert main(words) == 0
            assert len(server.received) == asked
            capsys.readouterr()
    assert cards["longer"]["agreement"] > 0.95
    assert cards["longer"]["consistency"] > 0.95
    assert cards["longer"]["longer"] > 0.5
    assert cards["longer"]["mass"] == pytest.approx(1)
    assert cards["coin"]["agreement"] < 0.75
    assert cards["coin"]["consistency"] < 0.75
    assert len(cards["coin"]["warnings"]) >= 2
    expo = few(tmp_path)[2]
    with judge_server("coin") as server:
        words = judge(server, "--outputs", expo, "--baseline", baseline, "--output", tmp_path / "out/coin", "--length-control", "none")  # fmt: skip
        summary = printed(capsys, words)
    assert summary["judge_card"] == cards["coin"]


@needs_data
def test_mt_bench_answers_are_graded_as_fastchat_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = EVAL / "mtbench"
    questions = [json.loads(line) for line in (data / "question.jsonl").read_text().split("\n") if line]
    answers = tmp_path / "model.jsonl"
    rows = [
        {"question_id": row["question_id"], "model_id": "model", "choices": [{"index": 0, "turns": [f"first {row['question_id']}", "second"]}]}
        for row in questions
    ]  # fmt: skip
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with judge_server("indifferent") as server:
        words = judge(
            server, "--answers", answers, "--data", data, "--output", tmp_path / "out", name="mtbench"
        )
        scores = printed(capsys, words)["models"]["model"]
        bodies = [body for _, body in server.received]
    assert len(bodies) == 160
    assert {body["temperature"] for body in bodies} == {0.0}
    with_reference = [body for body in bodies if "Reference" in json.dumps(body["messages"])]
    assert len(with_reference) == 2 * sum(
        row["category"] in {"math", "reasoning", "coding"} for row in questions
    )
    assert scores["average"] == pytest.approx(sum(rating_of(body["messages"]) for body in bodies) / 160)
    assert scores["n"] == 160
    answers.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "choices": rows[1]["choices"]}])
    )
    assert main(words) == 2
    assert "two answer sets" in capsys.readouterr().err


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("model", "requests"), [("zephyr-7b-alpha", 804), ("zephyr_0.05", 803)])
def test_a_published_win_rate_is_judged_again_through_a_kill(
    tmp_path: Path, model: str, requests: int
) -> None:
    pd = pytest.importorskip("pandas")
    instructions = [row["instruction"] for row in _lines(EVAL / "alpaca/prompts.jsonl.gz")]
    baseline = {
        instructions[row["index"]]: row["output"]
        for row in _lines(EVAL / "alpaca/baseline_gpt4_1106_preview.jsonl.gz")
    }
    table = pd.read_parquet(EVAL / "alpaca/expo_outputs.parquet")
    outputs = {
        instructions[row["index"]]: row["output"] for row in table[table.model == model].to_dict("records")
    }
    judged = pd.read_parquet(EVAL / "alpaca/preferences.parquet")
    judged = judged[(judged.model == model) & judged.lp_m.notna()].to_dict("records")
    published = pd.read_csv(EVAL / "alpaca/expected.csv").set_index("model").win_rate[model]
    with judge_server("replay") as server:
        server.stored = {
            pair: (row["lp_m"], row["lp_M"])
            for row in judged
            for pair in _both(baseline[instructions[row["index"]]], outputs[instructions[row["index"]]])
        }
        files = [
            written(tmp_path / f"{name}.json", texts, name)
            for name, texts in (("base", baseline), ("model", outputs))
        ]
        words = judge(server, "--outputs", files[1], "--baseline", files[0], "--output", tmp_path / "out", "--length-control", "none", "--json")  # fmt: skip
        command = [sys.executable, "-m", "expo_ray.cli", *words]
        with subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
        ) as first:
            wait_until(lambda: len(server.received) > requests // 2, "half of the judgments were made")
            first.kill()
        second = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        asked = len(server.received)
    assert json.loads(second.stdout)["win_rate"] == pytest.approx(published, abs=1e-6)
    assert json.loads(second.stdout)["n"] == 805
    assert requests <= asked <= requests + PART_ROWS + CONCURRENCY


def _both(first: str, second: str) -> list[tuple[str, str]]:
    # The stored log-probabilities belong to the order that was shown, and only that order is asked for.
    return [(first, second), (second, first)]

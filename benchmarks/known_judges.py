"""Do figures of judges whose right result is known come out right, on real answers and over HTTP?

An indifferent judge finds every two answers equal; one that likes length prefers the longer one by a little. Both are real servers on
loopback, asked by `expo-ray benchmark alpaca` with real answers of dpo and + ExPO models (`--data`, a folder with alpaca-eval's
files: see docs/benchmarks.md). Official length control, which holds GPT-4's verdicts, stands beside for comparison.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from benchmarks.result import TARGET_HEADER, report, table, target
from expo_ray.benchmark.alpaca_eval.annotations import read_annotations
from expo_ray.benchmark.alpaca_eval.covariates import load_covariates
from expo_ray.benchmark.alpaca_eval.win_rates import score_arm
from tests.support.judge_server import judge_server

BASELINE = "gpt4_1106_preview"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks known_judges", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with alpaca-eval's prompts, baselines and outputs"
    )
    parser.add_argument(
        "--pairs", type=int, default=8, help="pairs of models; a result is kept for all 8 only"
    )
    given = parser.parse_args()
    answers = read_outputs(given.data)
    pairs = [(name, dpo_of(name)) for name in answers if name.endswith(("-ExPO", "_a25.0"))][: given.pairs]
    rows: list[tuple[str, ...]] = []
    worst: dict[str, float] = {
        "indifferent, LC": 0.0,
        "indifferent, head to head": 0.0,
        "longer, head to head": 0.0,
    }
    raw = []
    for model, dpo in pairs:
        for mode in ("indifferent", "longer"):
            summary, official = judged(given.data, answers, model, dpo, mode)
            direct = summary["head_to_head"]["pairs"][0]
            lc, duel = (
                summary["difference"]["length_controlled_winrate"]["value"],
                direct["length_controlled_winrate"]["value"],
            )
            rows.append((model, mode, f"{summary['difference']['win_rate']['value']:+.2f}", f"{lc:+.2f}", f"{official:+.2f}", f"{direct['win_rate']['value']:.2f}", f"{duel:.2f}"))  # fmt: skip
            worst[f"{mode}, head to head"] = max(worst[f"{mode}, head to head"], abs(duel - 50))
            if mode == "indifferent":
                worst["indifferent, LC"] = max(worst["indifferent, LC"], abs(lc))
            else:
                raw.append(direct["win_rate"]["value"])
    header = (
        "model against its dpo",
        "judge",
        "win rate",
        "LC, rejudged",
        "LC, official",
        "head to head",
        "head to head, LC",
    )
    targets = [
        target(
            "indifferent judge: largest difference of LC win rates",
            worst["indifferent, LC"],
            0.3,
            unit=" points",
        ),
        target(
            "indifferent judge: largest distance of head to head from 50",
            worst["indifferent, head to head"],
            0.3,
            unit=" points",
        ),
        target(
            "judge that likes length: largest distance of head to head, LC, from 50",
            worst["longer, head to head"],
            1.5,
            unit=" points",
        ),
    ]
    note = f"Head to head as judged, the judge that likes length gives {min(raw):.1f} to {max(raw):.1f} (mean {statistics.mean(raw):.1f})."
    report(
        "known_judges",
        "Judges whose right result is known",
        [table(TARGET_HEADER, targets), table(header, rows), note],
        packages=("alpaca-eval", "numpy"),
        keep=given.pairs == 8,
    )


def dpo_of(name: str) -> str:
    """The model that an ExPO model was extrapolated from."""
    return name.removesuffix("-ExPO").removesuffix("_a25.0")


def judged(
    data: Path, answers: Mapping[str, Mapping[str, str]], model: str, dpo: str, mode: str
) -> tuple[dict[str, Any], float]:
    """What the command prints, and the difference of official length-controlled win rates of the same annotations."""
    with tempfile.TemporaryDirectory() as folder, judge_server(mode) as server:
        files = {name: Path(folder, f"{name}.json") for name in (model, dpo, BASELINE)}
        for name, file in files.items():
            rows = [
                {"instruction": key, "output": text, "generator": name} for key, text in answers[name].items()
            ]
            file.write_text(json.dumps(rows))
        command = ["-m", "expo_ray.cli", "benchmark", "alpaca", "--outputs", files[model], "--against", files[dpo], "--baseline", files[BASELINE],
                   "--covariates", data, "--judge", server.url, "--judge-model", mode, "--output", Path(folder, "out"), "--json"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        covariates = load_covariates(str(data))
        rates = []
        for name in (model, dpo):
            file = Path(folder, "out", "annotations", f"{name}-against-{BASELINE}.json")
            verdicts = read_annotations(str(file), covariates.prompts).verdicts
            controlled = score_arm(verdicts, covariates.official).controlled
            assert controlled is not None
            rates.append(controlled.interval.mean)
    return json.loads(done.stdout), rates[0] - rates[1]


def read_outputs(data: Path) -> dict[str, dict[str, str]]:
    """Answers of every model by instruction, the baseline's among them."""
    import pandas as pd

    instructions = {row["index"]: row["instruction"] for row in _lines(data / "prompts.jsonl.gz")}
    baseline = {
        instructions[row["index"]]: row["output"] for row in _lines(data / f"baseline_{BASELINE}.jsonl.gz")
    }
    frame = pd.read_parquet(data / "expo_outputs.parquet")
    return {BASELINE: baseline} | {
        str(name): {instructions[row["index"]]: row["output"] for row in rows.to_dict("records")}
        for name, rows in frame.groupby("model")
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]


if __name__ == "__main__":
    main()

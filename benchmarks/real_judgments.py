"""Part of `judgments.py` that needs real data: published scores are computed again, and judges with a known result are simulated."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result import TARGET_HEADER, table, target
from expo_ray.benchmark.alpaca_eval.covariates import Covariates, load_covariates
from expo_ray.benchmark.alpaca_eval.length_control import LengthControl, controlled_win_rate, rejudged_control
from expo_ray.benchmark.alpaca_eval.package_fit import package_win_rates
from expo_ray.benchmark.alpaca_eval.win_rates import score_arm
from expo_ray.benchmark.head_to_head import head_to_head
from expo_ray.benchmark.intervals import REFITS
from expo_ray.benchmark.judges.verdicts import Verdicts
from expo_ray.evaluation.statistics import Array

# A simulated judge: lengths of the first and second answers -> preference for the second, from 0 to 1.
Judge = Callable[[Array, Array], Array]
JUDGES: Mapping[str, Judge] = {
    "indifferent": lambda first, second: np.full(len(first), 0.5),
    "doubles the odds each 700 characters": lambda first, second: 1 / (1 + 2 ** ((first - second) / 700)),
    "80 % for the longer": lambda first, second: 0.5 + 0.3 * np.sign(second - first),
}
_EXPO = ("-ExPO", "_a25.0")


def sections_of(folder: str) -> list[str]:
    """Sections of the result. `folder` has the layout of `docs/benchmarks.md`, with expected.csv and the outputs as Parquet."""
    covariates = load_covariates(folder)
    return [*_published(Path(folder), covariates), *_judges(Path(folder), covariates)]


def _published(folder: Path, covariates: Covariates) -> list[str]:
    import pandas as pd

    expected = pd.read_csv(folder / "expected.csv").set_index("model")
    preferences = pd.read_parquet(folder / "preferences.parquet")
    models = {name: _verdicts(name, rows) for name, rows in preferences.groupby("model")}
    varied = {name: arm for name, arm in models.items() if np.ptp(arm.lengths - arm.opponent_lengths)}
    official = dict(
        zip(
            varied,
            package_win_rates([_columns(arm) for arm in varied.values()], covariates.gamed_csv),
            strict=True,
        )
    )
    rows, started = [], time.monotonic()
    for name, arm in varied.items():
        refit = float(controlled_win_rate(arm, covariates.official)(np.ones((1, len(arm.index))))[0])
        published = expected.loc[name]
        rows.append(
            (name, len(arm.index), 100 * arm.wins.mean() - published.win_rate, official[name] - published.length_controlled_winrate,
             refit - official[name])
        )  # fmt: skip
    score_arm(arm, covariates.official)
    seconds = time.monotonic() - started
    complete = [row for row in rows if row[1] == len(covariates.prompts)]
    largest = [max(abs(row[column]) for row in complete) for column in (2, 3, 4)]
    targets = [
        target("win rate, largest difference to the published one", largest[0], 1e-6, unit=""),
        target("LC win rate of the package, the same", largest[1], 0.2, unit=""),
        target("LC win rate refitted, to the package's", largest[2], 0.15, unit=""),
        target(f"{REFITS:,} refits of one model", seconds, 20, unit=" s"),
    ]
    shown = [
        (name, number, f"{raw:.1e}", f"{package:+.4f}", f"{refit:+.4f}")
        for name, number, raw, package, refit in rows
    ]
    return [
        f"{len(complete)} complete models and {len(rows) - len(complete)} incomplete ones, whose published LC win rate joined difficulties by the row's place:",
        table(TARGET_HEADER, targets),
        table(("model", "prompts", "win rate", "LC, package - published", "LC, refit - package"), shown),
    ]


def _judges(folder: Path, covariates: Covariates) -> list[str]:
    import pandas as pd

    outputs = pd.read_parquet(folder / "expo_outputs.parquet")
    lengths = {name: _by_prompt(rows["index"], rows.output) for name, rows in outputs.groupby("model")}
    baseline = _lengths(folder / "baseline_gpt4_1106_preview.jsonl.gz")
    gamed = [_lengths(folder / f"gamed_gpt4_1106_preview_{name}.jsonl.gz") for name in ("concise", "verbose")]
    pairs = [
        (name, partner)
        for name in lengths
        for partner in (f"{name}{ending}" for ending in _EXPO)
        if partner in lengths
    ]
    rows = []
    # Judge -> largest distances from the right result: of the difference of LC win rates, and of the LC head to head.
    largest = dict.fromkeys(JUDGES, (0.0, 0.0))
    for label, judge in JUDGES.items():
        verdicts = [_simulated(judge, each, baseline) for each in gamed]
        controls = (
            covariates.official,
            LengthControl("none", covariates.difficulty, None),
            rejudged_control(verdicts, covariates.difficulty),
        )
        for name, partner in pairs:
            dpo, expo = (_simulated(judge, lengths[each], baseline) for each in (name, partner))
            changes = [_rate(expo, control) - _rate(dpo, control) for control in controls]
            direct = head_to_head(_simulated(judge, lengths[partner], lengths[name]))
            raw = 100 * (expo.wins.mean() - dpo.wins.mean())
            distances = abs(changes[-1]), abs(direct.controlled.interval.mean - 50)
            largest[label] = max(largest[label][0], distances[0]), max(largest[label][1], distances[1])
            rows.append(
                (label, name, f"{direct.length_ratio:.2f}", f"{raw:+.2f}", *(f"{each:+.2f}" for each in changes),
                 f"{direct.win_rate.interval.mean:.2f}", f"{direct.controlled.interval.mean:.2f}")
            )  # fmt: skip
    header = (
        "judge",
        "pair",
        "length ratio",
        "win rate",
        "LC official",
        "LC none",
        "LC rejudged",
        "head to head",
        "head to head LC",
    )
    return [
        "Judges that look at length alone, on real outputs of dpo and + ExPO: differences + ExPO less dpo against the baseline, in points, and "
        "win rates head to head, in percent. The right result is 0, or 50.",
        table(TARGET_HEADER, _judge_targets(largest)),
        table(header, rows),
    ]


def _judge_targets(largest: Mapping[str, tuple[float, float]]) -> list[Sequence[str]]:
    indifferent, likes_length = list(JUDGES)[:2]
    return [
        target("indifferent judge: largest difference, LC rejudged", largest[indifferent][0], 0.3, unit=" points"),
        target("indifferent judge: largest distance of head to head LC from 50", largest[indifferent][1], 0.3, unit=" points"),
        target(f"judge that {likes_length}: the same", largest[likes_length][1], 1.5, unit=" points"),
    ]  # fmt: skip


def _rate(arm: Verdicts, control: LengthControl) -> float:
    return float(controlled_win_rate(arm, control)(np.ones((1, len(arm.index))))[0])


def _simulated(judge: Judge, lengths: Array, opponent: Array) -> Verdicts:
    index = np.arange(len(lengths), dtype=np.int64)
    return Verdicts("model", "baseline", "judge", index, judge(opponent, lengths), lengths, opponent)


def _verdicts(name: str, rows: Any) -> Verdicts:
    rows = rows.sort_values("index")
    columns = (rows[each].to_numpy(np.float64) for each in ("len_2", "len_1"))
    return Verdicts(
        name,
        "baseline",
        "",
        rows["index"].to_numpy(np.int64),
        rows.preference.to_numpy(np.float64) - 1,
        *columns,
    )


def _columns(arm: Verdicts) -> dict[str, Any]:
    return {
        "index": arm.index.tolist(),
        "preference": (arm.wins + 1).tolist(),
        "len_1": arm.opponent_lengths.astype(int).tolist(),
        "len_2": arm.lengths.astype(int).tolist(),
    }


def _lengths(file: Path) -> Array:
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().split("\n") if line]
    return _by_prompt([row["index"] for row in rows], [row["output"] for row in rows])


def _by_prompt(index: Sequence[int], outputs: Sequence[str]) -> Array:
    lengths = np.zeros(len(index))
    lengths[np.asarray(index)] = [len(output) for output in outputs]
    return lengths

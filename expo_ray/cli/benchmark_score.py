"""`expo-ray benchmark` without a judge: scores of judgments and results that exist."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np

from expo_ray.benchmark.alpaca_eval.annotations import Annotations, read_annotations
from expo_ray.benchmark.alpaca_eval.covariates import (
    OFFICIAL_BASELINE,
    OFFICIAL_JUDGES,
    Covariates,
    is_official,
    load_covariates,
)
from expo_ray.benchmark.alpaca_eval.package_fit import package_win_rates
from expo_ray.benchmark.alpaca_eval.win_rates import ArmDifference, ArmScore, compare_arms, score_arm
from expo_ray.benchmark.answer_checks import AnswerChecks, check_answers
from expo_ray.benchmark.head_to_head import head_to_head
from expo_ray.benchmark.judges.verdicts import Verdicts
from expo_ray.benchmark.mt_bench.ratings import ModelRatings, compare_ratings, read_ratings, score_ratings
from expo_ray.benchmark.open_llm_leaderboard import TASKS, ModelTasks, read_lm_eval_results
from expo_ray.benchmark.row_files import first_places, read_row_file
from expo_ray.benchmark.tables import (
    arm_json,
    arms_table,
    checks_table,
    difference_json,
    differences_table,
    estimate_json,
    head_to_head_forest,
    head_to_head_json,
    head_to_head_table,
    interval_json,
    markdown,
    ratings_difference_table,
    ratings_table,
    tasks_table,
)
from expo_ray.errors import BenchmarkError, Collected
from expo_ray.report.benchmark_page import Table, benchmark_page
from expo_ray.storage import open_output
from expo_ray.text import shown

log = logging.getLogger("expo_ray")


def score_alpaca(arguments: argparse.Namespace) -> int:
    """Print the win rates of one or two files of annotations; returns the exit status.

    Raises:
        Problems: everything that is wrong with the files.
    """
    covariates = load_covariates(arguments.covariates)
    files = _read_files(arguments.annotations, covariates, allow_missing=arguments.allow_missing)
    arms = [file.verdicts for file in files]
    checks = _checks(files)
    scores = _score(arms, covariates)
    difference = _difference(scores, covariates) if len(scores) == 2 else None
    tables = [arms_table(scores, arms[0].judge)] + ([differences_table([difference])] if difference else [])
    tables += [checks_table(checks)] if checks else []
    values = _arms_json(scores, difference) if difference else arm_json(scores[0])
    _print(values if arguments.json else tables)
    return 0


def score_pairs(arguments: argparse.Namespace) -> int:
    """Print one table of several pairs that were judged head to head, and write the page of them; returns the exit status.

    Raises:
        Problems: everything that is wrong with the files.
    """
    store = open_output(arguments.output) if arguments.output else None
    duels = [head_to_head(verdicts) for verdicts in _common_prompts(_read_pairs(arguments.annotations))]
    tables, values = [head_to_head_table(duels)], head_to_head_json(duels)
    if store is not None:
        page = benchmark_page("Head to head", tables, [head_to_head_forest(duels)])
        store.put("pairs.md", markdown(tables).encode("utf-8", "replace"))
        store.put("pairs.json", json.dumps(values, indent=2).encode())
        store.put("pairs.html", page.encode("utf-8", "replace"))
    _print(values if arguments.json else tables)
    return 0


def score_mtbench(arguments: argparse.Namespace) -> int:
    """Print MT-Bench's scores of files of ratings; returns the exit status.

    Raises:
        Problems: everything that is wrong with the files.
    """
    models = list(read_ratings(arguments.judgments, arguments.duplicates).values())
    for model in models:
        if not model.complete:
            log.warning(
                "%s: %d of the 160 ratings of MT-Bench, on %d of its 80 questions: not comparable with complete sets",
                shown(model.model), model.num_ratings + model.unparsed, len(model.questions),
            )  # fmt: skip
    tables, values = [ratings_table(models)], _ratings_json(models)
    if len(models) == 2:
        reference, model = models
        figure, questions = compare_ratings(model, reference)
        tables.append(ratings_difference_table(model.model, reference.model, figure, questions))
        values["difference"] = {
            "model": model.model, "reference": reference.model, "average": estimate_json(figure), "questions": questions,
        }  # fmt: skip
    _print(values if arguments.json else tables)
    return 0


def score_leaderboard(arguments: argparse.Namespace) -> int:
    """Print the six scores of the Open LLM Leaderboard v1 and their average; returns the exit status.

    Raises:
        Problems: everything that is wrong with the files.
    """
    models = list(read_lm_eval_results(arguments.results).values())
    for model in models:
        for note in model.notes:
            log.warning("%s: %s", shown(model.name), note)
        if model.missing:
            log.warning("%s: no average without %s", shown(model.name), ", ".join(model.missing))
    _print(
        {"models": {model.name: _tasks_json(model) for model in models}}
        if arguments.json
        else [tasks_table(models)]
    )
    return 0


def _read_files(files: Sequence[str], covariates: Covariates, *, allow_missing: bool) -> list[Annotations]:
    problems, read = Collected(), list[Annotations]()
    if len(files) > 2:
        problems.add(
            BenchmarkError(f"--annotations: {len(files)} files; give one, or two for their paired difference")
        )
    for file in files:
        with problems.catching():
            read.append(read_annotations(file, covariates.prompts, allow_missing=allow_missing))
    problems.raise_any()
    if len({annotations.verdicts.model for annotations in read}) < len(read):
        return [
            replace(annotations, verdicts=replace(annotations.verdicts, model=file))
            for file, annotations in zip(files, read, strict=True)
        ]
    return read


def _read_pairs(files: Sequence[str]) -> list[Verdicts]:
    """Read each pair's annotations; a prompt's place is that of its first row in all files."""
    problems = Collected()
    instructions: list[object] = []
    for file in files:
        with problems.catching():
            instructions += [row.get("instruction") for _, row in read_row_file(file).rows]
    problems.raise_any()
    prompts = list(dict.fromkeys(text for text in instructions if isinstance(text, str)))
    pairs: list[Verdicts] = []
    for file in files:
        with problems.catching():
            pairs.append(read_annotations(file, prompts, allow_missing=True).verdicts)
    judges = {pair.judge for pair in pairs}
    if len(judges) > 1:
        names = first_places({judge or "unnamed" for judge in judges})
        problems.add(
            BenchmarkError(
                f"pairs of {len(judges)} judges ({names}) are not comparable; give those of one judge"
            )
        )
    problems.raise_any()
    return pairs


def _common_prompts(pairs: Sequence[Verdicts]) -> list[Verdicts]:
    """Leave all pairs the prompts on which each has a verdict, as their mean needs the same ones."""
    parsed = [pair.parsed for pair in pairs]
    common = reduce(np.intersect1d, [pair.index for pair in parsed])
    if any(len(pair.index) > len(common) for pair in pairs):
        log.warning("%d prompts have a verdict in every pair; the others are left out", len(common))
    return [pair.at(common) for pair in parsed]


def _checks(files: Sequence[Annotations]) -> dict[str, AnswerChecks]:
    """Check the answers of each file that holds texts, the second against the first, and warn of what calls for a look."""
    checks = {
        file.verdicts.model: check_answers(file.answers, () if file is files[0] else files[0].answers)
        for file in files
        if file.answers
    }
    for model, check in checks.items():
        for flag in check.flags:
            log.warning("%s: %s", shown(model), flag)
    return checks


def _score(arms: Sequence[Verdicts], covariates: Covariates) -> list[ArmScore]:
    """Score each model, with the package's own length-controlled win rate where that is right."""
    official = [arm for arm in arms if is_official(arm.judge, arm.opponent)]
    values = _package_values(official, covariates)
    scores = []
    for arm in arms:
        if arm in official:
            scores.append(score_arm(arm, covariates.official, package_value=values.get(arm.model)))
            continue
        log.warning(
            "%s: no length-controlled win rate: the published regression holds verdicts of %s against %s, and is wrong for %s against "
            "%s; judge the answers again with `benchmark alpaca --outputs`, which lets that judge judge the gamed baselines too",
            shown(arm.model), OFFICIAL_JUDGES[0], OFFICIAL_BASELINE, shown(arm.judge or "another judge"), shown(arm.opponent),
        )  # fmt: skip
        scores.append(score_arm(arm, None))
    return scores


def _package_values(arms: Sequence[Verdicts], covariates: Covariates) -> dict[str, float]:
    """The package's win rate of each model, which it does not have where all lengths differ equally: it divides by their spread."""
    varied = [arm for arm in arms if arm.index.size and np.ptp(arm.opponent_lengths - arm.lengths) > 0]
    # The baseline against itself is 50 by definition; for others, our own fit leaves the length out.
    equal = [arm for arm in arms if arm not in varied and (arm.parsed.wins == 0.5).all()]
    columns = [
        {
            "index": arm.index.tolist(),
            "preference": [None if np.isnan(win) else win + 1 for win in arm.wins.tolist()],
            "len_1": arm.opponent_lengths.astype(int).tolist(),
            "len_2": arm.lengths.astype(int).tolist(),
        }
        for arm in varied
    ]
    rates = package_win_rates(columns, covariates.gamed_csv) if columns else []
    return dict(zip([arm.model for arm in varied], rates, strict=True)) | {arm.model: 50.0 for arm in equal}


def _difference(scores: Sequence[ArmScore], covariates: Covariates) -> ArmDifference:
    reference, model = scores
    return compare_arms(model, reference, covariates.official if model.controlled else None)


def _arms_json(scores: Sequence[ArmScore], difference: ArmDifference) -> dict[str, Any]:
    return {
        "models": {score.verdicts.model: arm_json(score) for score in scores},
        "difference": difference_json(difference),
    }


def _ratings_json(models: Sequence[ModelRatings]) -> dict[str, Any]:
    return {
        "models": {
            model.model: {
                "average": model.mean(),
                "turn_1": model.mean(0),
                "turn_2": model.mean(1),
                "n": model.num_ratings,
                "unparsed": model.unparsed,
                "intervals": {"average": interval_json(score_ratings(model).interval)},
                "categories": model.categories(),
            }
            for model in models
        }
    }


def _tasks_json(model: ModelTasks) -> dict[str, float | None]:
    values = {task: model.scores.get(task) for task in TASKS} | {"average": model.average}
    return values if model.gsm8k_flexible is None else values | {"gsm8k_flexible": model.gsm8k_flexible}


def _print(output: dict[str, Any] | Sequence[Table]) -> None:
    """JSON in ASCII, as names may hold anything; tables as Markdown."""
    text = json.dumps(output, indent=2) if isinstance(output, dict) else markdown(output).rstrip()
    sys.stdout.write(f"{text}\n")

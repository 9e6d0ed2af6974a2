"""`expo-ray benchmark` with a judge: what it takes, and what it prints."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from expo_ray.benchmark.alpaca import ArmDifference, ArmScore
from expo_ray.benchmark.alpaca_judging import (
    AlpacaResult,
    Prepared,
    Request,
    expected,
    judge_all,
    prepare,
    scores,
    write_annotations,
)
from expo_ray.benchmark.grading import grades_of, judgment_rows, read_chat_answers, read_mt_bench, rows_text
from expo_ray.benchmark.head_to_head import HeadToHead
from expo_ray.benchmark.intervals import Estimate
from expo_ray.benchmark.judge import Judge, Price, default_key_variable
from expo_ray.benchmark.judge_card import card_of, examination_of, write_card
from expo_ray.benchmark.judging import Judged, JudgeRoom, ask, check_cost, estimate
from expo_ray.errors import BenchmarkError, ExpoError, JobError
from expo_ray.evaluation.progress import RowProgress
from expo_ray.storage import join_uri, open_output
from expo_ray.untrusted import parse_json_object

log = logging.getLogger("expo_ray")

FAILED = 1


def judge_of(arguments: argparse.Namespace) -> Judge:
    """The judge that the options name.

    Raises:
        JobError: if one of them cannot be.
    """
    if not arguments.judge or not arguments.judge_model:
        raise JobError("a judge is needed: give --judge URL and --judge-model NAME")
    if not arguments.judge.startswith(("http://", "https://")):
        raise JobError(f"--judge {arguments.judge}: not a URL; give one such as http://127.0.0.1:8000/v1")
    if arguments.concurrency < 1:
        raise JobError(f"--concurrency {arguments.concurrency}: at least 1 request has to be in flight")
    if arguments.price and min(arguments.price) < 0:
        raise JobError(f"--price {arguments.price[0]:g} {arguments.price[1]:g}: a price is not negative")
    extra = (
        parse_json_object(arguments.extra, "--extra", error=JobError, remedy="give one JSON object")
        if arguments.extra
        else {}
    )
    variable = default_key_variable(arguments.judge) if arguments.key_env is None else arguments.key_env
    return Judge(
        arguments.judge,
        arguments.judge_model,
        variable,
        arguments.protocol,
        extra,
        Price(*arguments.price) if arguments.price else None,
        arguments.concurrency,
    )


def judge_alpaca(arguments: argparse.Namespace) -> int:
    """Judge one or two files of answers; returns the exit status, 1 if judgments are missing.

    Raises:
        ExpoError: everything wrong with the input, before the first question.
    """
    request = Request(
        arguments.outputs,
        judge_of(arguments),
        arguments.output,
        arguments.baseline,
        arguments.against,
        arguments.covariates,
        arguments.length_control,
        arguments.both_orders,
        arguments.allow_missing,
        arguments.retry_unparsed,
        arguments.max_cost,
    )
    prepared = prepare(request)
    for note in prepared.notes:
        log.warning("%s", note)
    wanted = expected(prepared)
    log.info("%s", wanted)
    if arguments.dry_run:
        return 0
    judged = _asked("benchmark", lambda progress: judge_all(prepared, progress))
    return _finish_alpaca(prepared, judged, as_json=arguments.json)


def grade_mtbench(arguments: argparse.Namespace) -> int:
    """Grade one or several files of MT-Bench answers; returns the exit status, 1 if grades are missing.

    Raises:
        ExpoError: everything wrong with the input, before the first question.
    """
    judge = judge_of(arguments)
    bench = read_mt_bench(arguments.data)
    answers = [read_chat_answers(uri, bench) for uri in arguments.answers]
    names = [model.name for model in answers]
    if len(set(names)) < len(names):
        raise BenchmarkError(
            f"two answer sets of one model ({', '.join(names)}); give each model's file once"
        )
    grades = [grade for model in answers for grade in grades_of(judge, bench, model)]
    questions = [grade.question for grade in grades]
    store = open_output(arguments.output)
    room = JudgeRoom(store, judge)
    wanted = estimate(judge, questions, room.answers())
    check_cost(judge, wanted, arguments.max_cost)
    log.info("%s", wanted)
    if arguments.dry_run:
        return 0
    judged = _asked(
        "benchmark", lambda progress: ask(room, questions, progress=progress, max_cost=arguments.max_cost)
    )
    key = f"judgments/{judge.id}_single.jsonl"
    store.put(key, rows_text(judgment_rows(judge, grades, judged.answers, time.time())))
    arguments.judgments = [join_uri(store.uri, key)]
    return _failed(judged.problems)


def examine_judge(arguments: argparse.Namespace) -> int:
    """Make the card of a judge; returns the exit status, 1 if answers are missing.

    Raises:
        ExpoError: everything wrong with the input, before the first question.
    """
    judge = judge_of(arguments)
    examination = examination_of(judge, arguments.reference, arguments.limit)
    room = JudgeRoom(open_output(arguments.output), judge)
    wanted = estimate(judge, examination.questions, room.answers())
    check_cost(judge, wanted, arguments.max_cost)
    log.info("%s", wanted)
    if arguments.dry_run:
        return 0
    judged = _asked(
        "benchmark",
        lambda progress: ask(room, examination.questions, progress=progress, max_cost=arguments.max_cost),
    )
    if judged.problems:
        return _failed(judged.problems)
    card = card_of(judge, examination, judged.answers)
    write_card(room, card)
    if arguments.json:
        _print(json.dumps(asdict(card), indent=1))
    else:
        _print(str(card))
        for warning in card.warnings:
            _print(f"warning: {warning}")
        _print(f"stored in {room.store.uri}/{room.prefix}")
    return 0


def _asked(stage: str, work: Callable[[RowProgress], Judged]) -> Judged:
    with RowProgress(stage, "judgments") as progress:
        return work(progress)


def _finish_alpaca(prepared: Prepared, judged: Judged, *, as_json: bool) -> int:
    paths = write_annotations(prepared, judged)
    if judged.problems and not prepared.request.allow_missing:
        return _failed(judged.problems)
    result = scores(prepared, judged)
    summary = result_json(prepared, result)
    prepared.store.put("results.json", (json.dumps(summary, indent=1) + "\n").encode())
    if as_json:
        _print(json.dumps(summary, indent=1))
    else:
        _print("\n".join(result_lines(prepared, result)))
        _print("\n".join(f"annotations: {path}" for path in paths))
    return _failed(judged.problems)


def result_json(prepared: Prepared, result: AlpacaResult) -> dict[str, Any]:
    """All figures, unrounded, in percent; intervals are two-sided, 95 %."""
    summary: dict[str, Any] = {
        "judge": prepared.request.judge.model,
        "protocol": prepared.request.judge.protocol,
    }
    summary |= {"length_control": result.length_control, "cost": result.cost, "notes": list(prepared.notes)}
    if result.score:
        summary |= _arm(result.score)
    if result.reference:
        summary["against"] = _arm(result.reference)
    if result.difference:
        summary["difference"] = _difference(result.difference)
    if result.direct:
        summary["head_to_head"] = _direct(result.direct)
    summary["judge_card"] = asdict(result.card) if result.card else None
    return summary


def result_lines(prepared: Prepared, result: AlpacaResult) -> list[str]:
    """The figures for a terminal, the primary one first."""
    judge = prepared.request.judge
    lines = []
    if result.direct:
        direct = result.direct
        lines += [
            f"{direct.model} against {direct.opponent}, {direct.prompts} prompts in both orders:",
            f"  win rate at equal length {_shown(direct.controlled)} (as judged {_shown(direct.win_rate)}); 50 means equally good",
            f"  this run could see a difference of {direct.controlled.detectable:.1f} points (80 % power)",
        ]
    for score in filter(None, [result.score, result.reference]):
        at_length = (
            f", at equal length ({score.control}) {_shown(score.controlled)}" if score.controlled else ""
        )
        lines.append(
            f"{score.verdicts.model} against {score.verdicts.opponent}: win rate {_shown(score.win_rate)}{at_length}"
        )
        if score.unparsed:
            lines.append(f"  {score.unparsed} prompt(s) without a verdict are left out")
    card = result.card
    lines.append(
        str(card) if card else f"judge {judge.model}: no judge card; `expo-ray benchmark judge` makes one"
    )
    return lines + [f"warning: {warning}" for warning in (card.warnings if card else ())]


def _arm(score: ArmScore) -> dict[str, Any]:
    figures = {"win_rate": score.win_rate, "length_controlled_winrate": score.controlled}
    return {
        "model": score.verdicts.model,
        **_values(figures),
        "n": len(score.verdicts.index),
        "unparsed": score.unparsed,
    }


def _difference(difference: ArmDifference) -> dict[str, Any]:
    figures = {"win_rate": difference.win_rate, "length_controlled_winrate": difference.controlled}
    return {**_values(figures), "n": difference.prompts, "detectable": _detectable(figures)}


def _direct(direct: HeadToHead) -> dict[str, Any]:
    figures: dict[str, Estimate | None] = {
        "win_rate": direct.win_rate,
        "length_controlled_winrate": direct.controlled,
    }
    return {
        "model": direct.model,
        "opponent": direct.opponent,
        **_values(figures),
        "n": direct.prompts,
        "unparsed": direct.unparsed,
        "p_value": direct.p_value,
        "length_ratio": direct.length_ratio,
        "detectable": _detectable(figures),
    }


def _values(figures: Mapping[str, Estimate | None]) -> dict[str, Any]:
    values: dict[str, Any] = {
        name: figure.interval.value if figure else None for name, figure in figures.items()
    }
    ends = {name: [figure.interval.low, figure.interval.high] for name, figure in figures.items() if figure}
    return values | {"intervals": ends}


def _detectable(figures: Mapping[str, Estimate | None]) -> dict[str, float]:
    return {name: figure.detectable for name, figure in figures.items() if figure}


def _shown(figure: Estimate | None) -> str:
    return (
        "-"
        if figure is None
        else f"{figure.interval.value:.2f} [{figure.interval.low:.2f}, {figure.interval.high:.2f}]"
    )


def _failed(problems: Sequence[ExpoError]) -> int:
    for problem in problems:
        sys.stderr.write(f"failed: {problem}\n")
    return FAILED if problems else 0


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")

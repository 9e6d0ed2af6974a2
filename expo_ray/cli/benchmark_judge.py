"""`expo-ray benchmark` with a judge: parse, call, print."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from expo_ray.benchmark.alpaca_eval.judge_answers import (
    AlpacaRequest,
    PreparedAlpaca,
    estimate_alpaca,
    judge_alpaca_answers,
    prepare_alpaca,
    score_alpaca_answers,
    write_annotations,
)
from expo_ray.benchmark.alpaca_eval.write_results import write_alpaca_results
from expo_ray.benchmark.judges.ask_judge import (
    AnswerStore,
    Judged,
    ask_judge,
    check_cost,
    estimate_cost,
    identify_judge,
)
from expo_ray.benchmark.judges.judge import Judge, Price, default_key_variable
from expo_ray.benchmark.judges.reliability import measure_judge, read_examination, write_judge_card
from expo_ray.benchmark.mt_bench.grade_answers import (
    fastchat_rows,
    json_lines,
    list_gradings,
    read_chat_answers,
    read_mt_bench,
)
from expo_ray.benchmark.tables import markdown
from expo_ray.cli.exit_status import FAILED
from expo_ray.errors import BenchmarkError, ExpoError, JobError
from expo_ray.progress import Progress
from expo_ray.storage import join_uri, open_output
from expo_ray.untrusted import parse_json_object

log = logging.getLogger("expo_ray")


def parse_judge(arguments: argparse.Namespace) -> Judge:
    """Check the options of the judge, and ask its endpoint for the identity of its weights.

    Raises:
        JobError: for the first option that has no sense.
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
    judge = Judge(
        url=arguments.judge,
        model=arguments.judge_model,
        key_variable=variable,
        protocol=arguments.protocol,
        extra=extra,
        price=Price(*arguments.price) if arguments.price else None,
        concurrency=arguments.concurrency,
    )
    return identify_judge(judge)


def judge_alpaca(arguments: argparse.Namespace) -> int:
    """Judge one or two files of answers; returns the exit status, 1 if judgments are missing.

    Raises:
        ExpoError: everything wrong with the input, before the first question.
    """
    request = AlpacaRequest(
        outputs=arguments.outputs,
        judge=parse_judge(arguments),
        output=arguments.output,
        baseline=arguments.baseline,
        against=arguments.against,
        covariates=arguments.covariates,
        length_control=arguments.length_control,
        both_orders=arguments.both_orders,
        allow_missing=arguments.allow_missing,
        retry_unparsed=arguments.retry_unparsed,
        max_cost=arguments.max_cost,
    )
    prepared = prepare_alpaca(request)
    for note in prepared.notes:
        log.warning("%s", note)
    wanted = estimate_alpaca(prepared)
    log.info("%s", wanted)
    if arguments.dry_run:
        return 0
    with Progress("benchmark", rows="judgments") as progress:
        judged = judge_alpaca_answers(prepared, progress)
    return _score_and_print(prepared, judged, as_json=arguments.json)


def grade_mtbench(arguments: argparse.Namespace) -> int:
    """Grade one or several files of MT-Bench answers; returns the exit status, 1 if grades are missing.

    Raises:
        ExpoError: everything wrong with the input, before the first question.
    """
    judge = parse_judge(arguments)
    bench = read_mt_bench(arguments.data)
    answers = [read_chat_answers(uri, bench) for uri in arguments.answers]
    names = [model.name for model in answers]
    if len(set(names)) < len(names):
        raise BenchmarkError(
            f"two answer sets of one model ({', '.join(names)}); give each model's file once"
        )
    gradings = [grading for model in answers for grading in list_gradings(judge, bench, model)]
    questions = [grading.question for grading in gradings]
    store = open_output(arguments.output)
    stored = AnswerStore(store, judge)
    wanted = estimate_cost(judge, questions, stored.read())
    check_cost(judge, wanted, arguments.max_cost)
    log.info("%s", wanted)
    if arguments.dry_run:
        return 0
    with Progress("benchmark", rows="judgments") as progress:
        judged = ask_judge(stored, questions, progress=progress, max_cost=arguments.max_cost)
    key = f"judgments/{judge.id}_single.jsonl"
    store.put(key, json_lines(fastchat_rows(judge, gradings, judged.answers, time.time())))
    arguments.judgments = [join_uri(store.uri, key)]
    return _failed(judged.problems)


def examine_judge(arguments: argparse.Namespace) -> int:
    """Make the card of a judge; returns the exit status, 1 if answers are missing.

    Raises:
        ExpoError: everything wrong with the input, before the first question.
    """
    judge = parse_judge(arguments)
    examination = read_examination(judge, arguments.reference, arguments.limit)
    stored = AnswerStore(open_output(arguments.output), judge)
    wanted = estimate_cost(judge, examination.questions, stored.read())
    check_cost(judge, wanted, arguments.max_cost)
    log.info("%s", wanted)
    if arguments.dry_run:
        return 0
    with Progress("benchmark", rows="judgments") as progress:
        judged = ask_judge(stored, examination.questions, progress=progress, max_cost=arguments.max_cost)
    if judged.problems:
        return _failed(judged.problems)
    card = measure_judge(judge, examination, judged.answers)
    write_judge_card(stored, card)
    if arguments.json:
        print(json.dumps(asdict(card), indent=1))
    else:
        print(str(card))
        for warning in card.warnings:
            print(f"warning: {warning}")
        print(f"stored in {stored.store.uri}/{stored.prefix}")
    return 0


def _score_and_print(prepared: PreparedAlpaca, judged: Judged, *, as_json: bool) -> int:
    paths = write_annotations(prepared, judged)
    if judged.problems and not prepared.request.allow_missing:
        return _failed(judged.problems)
    result = score_alpaca_answers(prepared, judged)
    summary, tables = write_alpaca_results(prepared, result)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        print(markdown(tables))
        print("\n".join(f"annotations: {path}" for path in paths))
        print(f"results: {prepared.store.uri}/results.html, results.md and results.json")
    return _failed(judged.problems)


def _failed(problems: Sequence[ExpoError]) -> int:
    for problem in problems:
        sys.stderr.write(f"failed: {problem}\n")
    return FAILED if problems else 0

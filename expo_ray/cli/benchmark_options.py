"""The options of `expo-ray benchmark`. Imported at every start of the command line, so it imports nothing that takes time."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from expo_ray.config.fields import DuplicatePolicy, JudgeProtocol, LengthControlKind

Parser = argparse.ArgumentParser


def add_benchmark(parser: Parser) -> None:
    """Add the sub-commands; what the parser finds has their name in `benchmark`."""
    parsers = parser.add_subparsers(title="benchmarks", required=True, dest="benchmark")
    _add_alpaca(
        _named(
            parsers,
            "alpaca",
            "AlpacaEval 2.0 and head to head: scores of annotations, or of answers by a judge",
        )
    )
    _add_pairs(
        _named(
            parsers, "pairs", "several pairs, each judged head to head: one table and page, and their mean"
        )
    )
    _add_mtbench(_named(parsers, "mtbench", "MT-Bench: scores of judgments, or of answers by a judge"))
    _add_leaderboard(_named(parsers, "leaderboard", "Open LLM Leaderboard: scores of lm-eval's results"))
    _add_judge(_named(parsers, "judge", "measure how far a judge can be trusted, and store its card"))


def _named(parsers: Any, name: str, text: str) -> Parser:
    parser: Parser = parsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    return parser


def _add_alpaca(parser: Parser) -> None:
    add = parser.add_argument
    given = parser.add_argument_group("what to score").add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--annotations",
        nargs="+",
        metavar="FILE",
        help="annotations.json of alpaca-eval; a second file gives paired differences.",
    )
    given.add_argument(
        "--outputs", metavar="FILE", help="Answers of a model, as alpaca-eval writes them; needs a judge."
    )
    add(
        "--covariates",
        metavar="DIR",
        help="Folder with df_gamed.csv and the list of instructions (prompts.jsonl, prompts.jsonl.gz or alpaca_eval.json), for length "
        "control; with --outputs also the concise and verbose baselines. Default: downloaded.",
    )
    add("--allow-missing", action="store_true", help="Score the instructions that are there.")
    add("--json", action="store_true", help="Print JSON, unrounded, in percent.")
    judged = parser.add_argument_group("with --outputs")
    judged.add_argument(
        "--against",
        metavar="FILE",
        help="Answers of another model, such as dpo's: judged head to head, in both orders.",
    )
    judged.add_argument(
        "--baseline", metavar="FILE", help="The baseline's answers. Default: AlpacaEval's, downloaded."
    )
    judged.add_argument(
        "--output",
        metavar="DIR",
        help="Folder of judgments, annotations and results; a second run goes on there.",
    )
    judged.add_argument(
        "--both-orders", action="store_true", help="Judge against the baseline in both orders, too."
    )
    judged.add_argument(
        "--length-control",
        choices=get_args(LengthControlKind),
        help="rejudge: let this judge judge the concise and verbose baselines once; official: GPT-4-1106's own verdicts on them. "
        "Default: rejudge where their answers are at hand.",
    )
    judged.add_argument(
        "--retry-unparsed", action="store_true", help="Ask again where an answer holds no verdict."
    )
    _add_judge_options(parser)


def _add_pairs(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--annotations",
        nargs="+",
        required=True,
        metavar="FILE",
        help="A file for each pair: what `benchmark alpaca --outputs ... --against ...` wrote of the two models.",
    )
    add("--output", metavar="DIR", help="Folder for pairs.md, pairs.json and pairs.html.")
    add("--json", action="store_true", help="Print JSON, unrounded, in percent.")


def _add_mtbench(parser: Parser) -> None:
    add = parser.add_argument
    given = parser.add_argument_group("what to score").add_mutually_exclusive_group(required=True)
    given.add_argument("--judgments", nargs="+", metavar="FILE", help="FastChat's *_single.jsonl.")
    given.add_argument(
        "--answers",
        nargs="+",
        metavar="FILE",
        help="A model's answers, as FastChat or `expo-ray respond --format mt-bench` writes them; needs a judge.",
    )
    add(
        "--duplicates",
        choices=get_args(DuplicatePolicy),
        default="refuse",
        help="What to do with two judgments of one turn. Default: %(default)s.",
    )
    add("--json", action="store_true", help="Print JSON, unrounded.")
    judged = parser.add_argument_group("with --answers")
    judged.add_argument(
        "--data",
        metavar="DIR",
        help="Folder with FastChat's question.jsonl, judge_prompts.jsonl and reference_answer_gpt-4.jsonl. Default: downloaded.",
    )
    judged.add_argument("--output", metavar="DIR", help="Folder of judgments; a second run goes on there.")
    _add_judge_options(parser)


def _add_leaderboard(parser: Parser) -> None:
    parser.add_argument(
        "--results",
        nargs="+",
        required=True,
        metavar="DIR",
        help="Results of lm-eval 0.4 or 0.3: a folder for each model.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON, unrounded.")


def _add_judge(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--reference",
        metavar="FILE",
        help="annotations.json of GPT-4, with both outputs. Default: alpaca-eval's of vicuna-7b, downloaded.",
    )
    add(
        "--limit",
        type=int,
        default=100,
        metavar="N",
        help="Prompts, each judged in both orders. Default: %(default)s.",
    )
    add("--output", required=True, metavar="DIR", help="Folder of the card and the judgments.")
    add("--json", action="store_true", help="Print JSON.")
    _add_judge_options(parser, required=True)


def _add_judge_options(parser: Parser, *, required: bool = False) -> None:
    add = parser.add_argument_group("judge").add_argument
    add(
        "--judge",
        required=required,
        metavar="URL",
        help="Base URL of an OpenAI-compatible endpoint, ending in /v1.",
    )
    add("--judge-model", required=required, metavar="NAME", help="The judge's name there.")
    add(
        "--key-env",
        metavar="VAR",
        help="Variable that holds the endpoint's key. Default: OPENAI_API_KEY for api.openai.com, none for any other host.",
    )
    add(
        "--protocol",
        choices=get_args(JudgeProtocol),
        default="logprobs",
        help="Read the log-probabilities of one token, as AlpacaEval 2.0 does, or let the judge reason and read its verdict. "
        "Default: %(default)s.",
    )
    add(
        "--extra",
        metavar="JSON",
        help='Further fields of each request, such as \'{"reasoning_effort": "none"}\'.',
    )
    add(
        "--price",
        nargs=2,
        type=float,
        metavar=("PROMPT", "ANSWER"),
        help="Dollars for a million tokens, to report and bound the cost.",
    )
    add("--max-cost", type=float, metavar="X", help="Stop before X dollars are passed; needs --price.")
    add("--concurrency", type=int, default=16, metavar="N", help="Requests in flight. Default: %(default)s.")
    add(
        "--dry-run",
        action="store_true",
        help="Check every file, say what would be asked and what it costs, and stop.",
    )

"""The parser of the command line `expo-ray`; flags of the job file's fields take their choices and help from there."""

from __future__ import annotations

import argparse
import os
from typing import Any, get_args

from expo_ray import __version__
from expo_ray.cli.benchmark_options import add_benchmark
from expo_ray.cli.flags import add_field, count, default_of, multiplier, repo_id, size
from expo_ray.cli.plan_table import WORKER_BYTES_PER_S
from expo_ray.config import Job, Pair, PairOptions, PromptSource, RewardModel, Sampling, Serving
from expo_ray.config.fields import ResponseFormat
from expo_ray.progress import size_text


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def command_parser() -> argparse.ArgumentParser:
    """Build the parser; the name of the command is parsed into `command`."""
    parser = argparse.ArgumentParser(
        prog="expo-ray",
        formatter_class=_Help,
        description="Better-aligned models without training: W = W_dpo + alpha (W_dpo - W_sft).",
    )
    parser.add_argument("--version", action="version", version=f"expo-ray {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, dest="command")
    _add_extrapolate(commands)
    _add_plan(commands)
    _add_verify(commands)
    _add_run(commands)
    _add_serve(commands)
    _add_respond(commands)
    _add_reward(commands)
    _add_report(commands)
    _add_push(commands)
    add_benchmark(_add_command(commands, "benchmark", "score models on the paper's benchmarks"))
    _add_command(commands, "schema", "print the JSON schema of the job file")
    return parser


def _add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=_Help
    )
    return parser


def _add_plan(commands: Any) -> None:
    parser = _add_command(
        commands, "plan", "print what a job would do, from headers alone; nothing is written"
    )
    add = parser.add_argument
    add("job", metavar="JOB.yaml", help="The job file.")
    add(
        "--workers",
        type=count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="Shards under way at once. Default: %(default)s.",
    )
    add(
        "--bandwidth",
        type=size,
        default=WORKER_BYTES_PER_S,
        metavar="SIZE",
        help=f"Bytes a second of one worker. Default: {size_text(WORKER_BYTES_PER_S)}.",
    )


def _add_verify(commands: Any) -> None:
    parser = _add_command(commands, "verify", "check a model against its manifest and its parents")
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="A model, made by this or any other tool.")
    add(
        "--sft",
        metavar="URI",
        help="With --dpo: compute the weights again, and print the alpha that fits each tensor.",
    )
    add("--dpo", metavar="URI", help="See --sft.")
    add_field(parser, PairOptions, "allow_pickle", default=False)


def _add_run(commands: Any) -> None:
    parser = _add_command(
        commands, "run", "choose the alpha of each pair of a job, publish the winners and write the report"
    )
    parser.add_argument("job", metavar="JOB.yaml", help="The job file.")
    parser.add_argument(
        "--dry-run", action="store_true", help="Check everything and stop; nothing is written."
    )


def _add_serve(commands: Any) -> None:
    parser = _add_command(
        commands, "serve", "answer for every alpha of a job's pairs, and for its models, until interrupted"
    )
    parser.add_argument("job", metavar="JOB.yaml", help="The job file.")
    add_field(parser, Serving, "port", type=int)


def _add_respond(commands: Any) -> None:
    parser = _add_command(commands, "respond", "let models answer prompts")
    add = parser.add_argument
    add(
        "job",
        nargs="?",
        metavar="JOB.yaml",
        help="All of a job's prompts, to all its pairs, alphas and models.",
    )
    add(
        "--model",
        metavar="URI|URL",
        help="Without a job: a model folder, or the URL of an OpenAI-compatible endpoint.",
    )
    add("--name", metavar="NAME", help="The model's name at the endpoint, if it serves several.")
    add_field(parser, PromptSource, "source", "--prompts", metavar="SOURCE")
    add_field(parser, PromptSource, "limit", type=count)
    add("--output", metavar="FILE", help="JSONL file to write; one that is there is completed.")
    add(
        "--format",
        choices=get_args(ResponseFormat),
        default="jsonl",
        help="Of the output. Default: %(default)s.",
    )
    for field in Sampling.model_fields:
        add_field(parser, Sampling, field)


def _add_reward(commands: Any) -> None:
    parser = _add_command(commands, "reward", "score responses with reward models")
    add = parser.add_argument
    add("job", nargs="?", metavar="JOB.yaml", help="All responses of a job, by all its reward models.")
    add("--responses", metavar="FILE", help="Without a job: the file that `expo-ray respond` wrote.")
    add_field(parser, RewardModel, "model", "--reward-model", metavar="URI")
    for field in ("backend", "allow_pickle", "truncate"):
        add_field(parser, RewardModel, field)
    add("--output", metavar="FILE", help="JSONL file to write; one that is there is completed.")


def _add_report(commands: Any) -> None:
    parser = _add_command(
        commands, "report", "draw the page of a finished run again, from what it stored, without a cluster"
    )
    parser.add_argument("run", metavar="RUN", help="The `output` of the run's job: a folder or a URI.")


def _add_push(commands: Any) -> None:
    parser = _add_command(commands, "push", "push a published model to the Hugging Face Hub, in one commit")
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="A model that expo-ray published: a folder or a URI.")
    add("repo_id", type=repo_id, metavar="ORG/NAME", help="Its repository, which is created if need be.")
    add(
        "--private",
        action="store_true",
        help="If the repository is created. One that is there keeps its visibility.",
    )
    add("--dry-run", action="store_true", help="Check everything, print what would be sent, and stop.")


def _add_extrapolate(commands: Any) -> None:
    parser = _add_command(commands, "extrapolate", "extrapolate one pair in this process, without a cluster")
    add = parser.add_argument
    for field in ("sft", "dpo"):
        add_field(parser, Pair, field, required=True, metavar="URI")
    add(
        "--alpha",
        required=True,
        action="append",
        dest="alphas",
        metavar="A",
        help="Step past dpo, a finite number of at least -1: -1 gives sft, 0 gives dpo. Repeat it for several models.",
    )
    add(
        "--output",
        required=True,
        metavar="URI",
        help="The model's folder; with several alphas, folders `alpha=A` below it.",
    )
    for field in ("rounding", "dtype", "vocab", "adapter"):
        add_field(parser, PairOptions, field)
    add(
        "--multiplier",
        action="append",
        type=multiplier,
        default=[],
        metavar="REGEX=M",
        help="Multiply alpha by M in tensors whose name has REGEX; 0 freezes them at dpo. Repeatable, the first found counts.",
    )
    add_field(parser, PairOptions, "shard_size", metavar="SIZE")
    for field in ("seed", "allow_pickle"):
        add_field(parser, PairOptions, field)
    add_field(parser, Job, "device", default=default_of(Job, "device"))
    add("--overwrite", action="store_true", help="Replace a model that expo-ray wrote there before.")
    add("--dry-run", action="store_true", help="Print the plan and stop; nothing is written.")

"""The command line `expo-ray`: parse, call, print."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from expo_ray import __version__
from expo_ray.config import (
    Job,
    Pair,
    PairOptions,
    format_alpha,
    job_schema,
    load_job,
    parse_bytes,
    parse_pair,
)
from expo_ray.errors import ExpoError, Problems
from expo_ray.extrapolation.describe import describe
from expo_ray.extrapolation.in_threads import InThreads
from expo_ray.extrapolation.job import JobPlan, Outcome, outputs_of, plan_job, run_job
from expo_ray.extrapolation.progress import Progress
from expo_ray.extrapolation.verify import Fit, fit_alphas, read_manifest, rederive, verify_files
from expo_ray.storage import join_uri, open_store

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for work that failed, 2 for bad input, 130 when interrupted."""
    parsed = _parser().parse_args(arguments)
    return guarded(lambda: parsed.command(parsed))


def guarded(command: Callable[[], int]) -> int:
    """Run `command`, turning errors that a user can mend into text and an exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as on Ctrl-C
    try:
        return command()
    except Problems as error:
        print(f"{len(error.problems)} problem(s), nothing was written:\n{error}", file=sys.stderr)
        return BAD_INPUT
    except ExpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        return INTERRUPTED


def report(outcome: Outcome) -> int:
    """Print what came of a job; the exit status of the process."""
    for model in sorted(outcome.published, key=lambda model: (model.pair, model.alpha)):
        print(
            f"{model.uri}: alpha {format_alpha(model.alpha)}, effective {model.effective_alpha:.3f}, {model.size / 1e9:.2f} GB"
        )
        for warning in model.warnings:
            print(f"  warning: {warning}")
    for name, error in outcome.failures.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    return FAILED if outcome.failures else 0


def _extrapolate(arguments: argparse.Namespace) -> int:
    pair = parse_pair(_options_of(arguments), "command line")
    outputs = {
        alpha: arguments.output
        if len(pair.alphas) == 1
        else join_uri(arguments.output, f"alpha={format_alpha(alpha)}")
        for alpha in pair.alphas
    }
    job = plan_job([pair], [outputs], overwrite=arguments.overwrite)
    if arguments.dry_run:
        print(describe(job, workers=1, bandwidth=parse_bytes("1GB")))
        return 0
    with Progress() as progress, InThreads(progress, device=arguments.device) as executor:
        outcome = run_job(job, executor, progress)
    return report(outcome)


def _plan(arguments: argparse.Namespace) -> int:
    job = load_job(arguments.job)
    print(describe(plan_of(job), workers=arguments.workers, bandwidth=arguments.bandwidth))
    return 0


def plan_of(job: Job, *, overwrite: bool = False) -> JobPlan:
    """The plan of a job file."""
    return plan_job(job.pairs, [outputs_of(job, pair) for pair in job.pairs], overwrite=overwrite)


def _verify(arguments: argparse.Namespace) -> int:
    if (arguments.sft is None) != (arguments.dpo is None):
        raise ExpoError("one parent is given; give both --sft and --dpo, or neither")
    store = open_store(arguments.folder)
    manifest = read_manifest(store)
    if manifest is None and arguments.sft is None:
        raise ExpoError(
            f"{store.uri} has no expo.json; give --sft and --dpo to see which alpha fits its weights"
        )
    problems = verify_files(store, manifest) if manifest else []
    if manifest and not problems:
        print(
            f"{store.uri}: {len(manifest['shards'])} shard(s) and {len(manifest['files'])} file(s) are as published"
        )
    if arguments.sft:
        _print_fits(list(fit_alphas(arguments.folder, arguments.sft, arguments.dpo)))
        if manifest:
            problems += rederive(manifest, arguments.sft, arguments.dpo)
            if not problems:
                print("computed again from both parents: the same bytes")
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    return FAILED if problems else 0


def _print_fits(fits: Sequence[Fit]) -> None:
    width = max(len(fit.name) for fit in fits)
    print(f"{'tensor':{width}}  {'alpha':>8}  {'delta/weight':>12}  {'residual':>9}")
    for fit in fits:
        print(f"{fit.name:{width}}  {fit.alpha:8.4f}  {fit.relative_delta:12.2e}  {fit.residual:9.2e}")
    moved = [fit.alpha for fit in fits if fit.relative_delta]
    if moved:
        print(
            f"alpha fits between {min(moved):.4f} and {max(moved):.4f} over {len(moved)} tensors with a delta"
        )


def _schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(job_schema(), indent=2))
    return 0


def _options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {
        key: value for key, value in vars(arguments).items() if key in Pair.model_fields and value is not None
    }
    multipliers = dict(text.rpartition("=")[::2] for text in arguments.multiplier)
    return given | ({"multipliers": multipliers} if multipliers else {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expo-ray",
        description="Better-aligned models without training: W = W_dpo + alpha (W_dpo - W_sft).",
    )
    parser.add_argument("--version", action="version", version=f"expo-ray {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_extrapolate(commands)
    plan = commands.add_parser("plan", help="what a job would do, from headers alone; nothing is written")
    plan.add_argument("job", metavar="JOB.yaml")
    plan.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="shards under way at once")
    plan.add_argument(
        "--bandwidth", type=_size, default="500MB", help="bytes a second of one worker (%(default)s)"
    )
    plan.set_defaults(command=_plan)
    verify = commands.add_parser("verify", help="check a model against its manifest and its parents")
    verify.add_argument("folder", metavar="FOLDER", help="a model, made by this or any other tool")
    verify.add_argument(
        "--sft", metavar="URI", help="with --dpo: compute the weights again, print the alpha that fits"
    )
    verify.add_argument("--dpo", metavar="URI")
    verify.set_defaults(command=_verify)
    commands.add_parser("schema", help="print the JSON schema of the job file").set_defaults(command=_schema)
    return parser


def _add_extrapolate(commands: Any) -> None:
    parser = commands.add_parser(
        "extrapolate", help="extrapolate one pair in this process, without a cluster"
    )
    add = parser.add_argument
    add("--sft", required=True, metavar="URI", help=_text(Pair, "sft"))
    add("--dpo", required=True, metavar="URI", help=_text(Pair, "dpo"))
    add(
        "--alpha",
        required=True,
        action="append",
        dest="alphas",
        metavar="A",
        help=_text(PairOptions, "alphas"),
    )
    add(
        "--output",
        required=True,
        metavar="URI",
        help="the model's folder; with several alphas, folders alpha=A below it",
    )
    for name, choices in (
        ("rounding", ("nearest", "stochastic", "reference")),
        ("dtype", ("keep", "bf16", "fp16", "fp32")),
        ("vocab", ("refuse", "by-token", "keep-dpo")),
        ("adapter", ("scale", "merge")),
    ):
        add(f"--{name}", choices=choices, help=_text(PairOptions, name))
    add(
        "--multiplier", action="append", default=[], metavar="REGEX=M", help=_text(PairOptions, "multipliers")
    )
    add("--shard-size", metavar="SIZE", help=_text(PairOptions, "shard_size"))
    add("--seed", metavar="N", help=_text(PairOptions, "seed"))
    add("--allow-pickle", action="store_true", default=None, help=_text(PairOptions, "allow_pickle"))
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=_text(Job, "device"))
    add("--overwrite", action="store_true", help="replace a model that expo-ray wrote there before")
    add("--dry-run", action="store_true", help="print the plan and stop; nothing is written")
    parser.set_defaults(command=_extrapolate)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _text(model: type[PairOptions] | type[Job], field: str) -> str:
    """The help text of a field, with its default."""
    info = model.model_fields[field]
    text = " ".join((info.description or "").split()).replace("%", "%%")
    default = info.get_default(call_default_factory=True) if not info.is_required() else None
    return (
        f"{text} Default: {default}."
        if isinstance(default, str | int) and not isinstance(default, bool)
        else text
    )


if __name__ == "__main__":
    sys.exit(main())

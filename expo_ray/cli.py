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
from expo_ray.extrapolation.fit import Fit, fit_alphas
from expo_ray.extrapolation.in_threads import InThreads
from expo_ray.extrapolation.job import JobPlan, Outcome, outputs_of, plan_job, run_job
from expo_ray.extrapolation.progress import Progress, size_text
from expo_ray.extrapolation.verify import read_manifest, rederive, verify_files
from expo_ray.storage import join_uri, open_store

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for work that failed, 2 for bad input, 130 when interrupted."""
    parsed = _parser().parse_args(arguments)
    return guarded(lambda: parsed.command(parsed))


def guarded(command: Callable[[], int]) -> int:
    """Run `command`, turning errors that a user can mend into text and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("expo_ray").setLevel(logging.INFO)
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
        effective = "" if model.effective_alpha is None else f" (effective {model.effective_alpha:.3f})"
        print(f"{model.uri}: alpha {format_alpha(model.alpha)}{effective}, {size_text(model.size)}")
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
    for note in (note for plan in job.pairs for note in plan.notes):
        print(f"note: {note}", file=sys.stderr)
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
        parents = arguments.sft, arguments.dpo
        if not (manifest and manifest["arithmetic"].get("adapter")):
            _print_fits(*fit_alphas(arguments.folder, *parents, allow_pickle=arguments.allow_pickle))
        if manifest:
            wrong = rederive(manifest, *parents, allow_pickle=arguments.allow_pickle)
            problems += wrong
            if not wrong:
                print("computed again from both parents: the same bytes")
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    return FAILED if problems else 0


def _print_fits(fits: Sequence[Fit], skipped: Sequence[str]) -> None:
    width = max(len(fit.name) for fit in fits)
    print(f"{'tensor':{width}}  {'alpha':>8}  {'delta/weight':>12}  {'residual':>9}")
    for fit in fits:
        print(f"{fit.name:{width}}  {fit.alpha:8.4f}  {fit.relative_delta:12.2e}  {fit.residual:9.2e}")
    for text in skipped:
        print(f"not compared: {text}")
    moved = [fit for fit in fits if fit.delta_square]
    if moved:
        best = sum(fit.alpha * fit.delta_square for fit in moved) / sum(fit.delta_square for fit in moved)
        least, most = (choose(fit.alpha for fit in moved) for choose in (min, max))
        print(
            f"alpha {best:.4f} fits best over the {len(moved)} tensors with a delta, {least:.4f} to {most:.4f} one by one"
        )
    else:
        print("sft and dpo do not differ in these tensors, so that any alpha fits")


def _schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(job_schema(), indent=2))
    return 0


def _options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {
        key: value for key, value in vars(arguments).items() if key in Pair.model_fields and value is not None
    }
    if "://" not in arguments.dpo:  # `.` and `..` have a name as well
        given["name"] = Pair(sft="-", dpo=os.path.abspath(os.path.expanduser(arguments.dpo))).name
    return given | ({"multipliers": dict(arguments.multiplier)} if arguments.multiplier else {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expo-ray",
        description="Better-aligned models without training: W = W_dpo + alpha (W_dpo - W_sft).",
    )
    parser.add_argument("--version", action="version", version=f"expo-ray {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_extrapolate(commands)
    _add_plan(commands)
    _add_verify(commands)
    _add_command(commands, "schema", "print the JSON schema of the job file").set_defaults(command=_schema)
    return parser


def _add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    return parser


def _add_plan(commands: Any) -> None:
    parser = _add_command(
        commands, "plan", "print what a job would do, from headers alone; nothing is written"
    )
    add = parser.add_argument
    add("job", metavar="JOB.yaml", help="the job file")
    add(
        "--workers",
        type=_count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="shards under way at once. Default: %(default)s.",
    )
    add(
        "--bandwidth",
        type=_size,
        default="500MB",
        metavar="SIZE",
        help="bytes a second of one worker. Default: %(default)s.",
    )
    parser.set_defaults(command=_plan)


def _add_verify(commands: Any) -> None:
    parser = _add_command(commands, "verify", "check a model against its manifest and its parents")
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a model, made by this or any other tool")
    add("--sft", metavar="URI", help="with --dpo: compute the weights again, print the alpha that fits each")
    add("--dpo", metavar="URI", help="see --sft")
    add("--allow-pickle", action="store_true", help=_text(PairOptions, "allow_pickle"))
    parser.set_defaults(command=_verify)


def _add_extrapolate(commands: Any) -> None:
    parser = _add_command(commands, "extrapolate", "extrapolate one pair in this process, without a cluster")
    add = parser.add_argument
    add("--sft", required=True, metavar="URI", help=_text(Pair, "sft"))
    add("--dpo", required=True, metavar="URI", help=_text(Pair, "dpo"))
    add(
        "--alpha",
        required=True,
        action="append",
        dest="alphas",
        metavar="A",
        help="step past dpo, a finite number of at least -1 (-1 gives sft, 0 gives dpo); repeat it for several models",
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
        "--multiplier",
        action="append",
        type=_multiplier,
        default=[],
        metavar="REGEX=M",
        help="multiply alpha by M in tensors whose name has REGEX; 0 freezes them at dpo; repeatable, the first found counts",
    )
    add("--shard-size", metavar="SIZE", help=_text(PairOptions, "shard_size"))
    add("--seed", metavar="N", help=_text(PairOptions, "seed"))
    add("--allow-pickle", action="store_true", default=None, help=_text(PairOptions, "allow_pickle"))
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=_text(Job, "device"))
    add("--overwrite", action="store_true", help="replace a model that expo-ray wrote there before")
    add("--dry-run", action="store_true", help="print the plan and stop; nothing is written")
    parser.set_defaults(command=_extrapolate)


def _multiplier(text: str) -> tuple[str, str]:
    pattern, equals, factor = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no factor; write it like 'embed_tokens|lm_head=0'")
    return pattern, factor


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


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
    if isinstance(default, bool) or not isinstance(default, str | int):
        return text
    shown = size_text(default) if isinstance(default, int) and default >= 1000 else default
    return f"{text} Default: {shown}."


if __name__ == "__main__":
    sys.exit(main())

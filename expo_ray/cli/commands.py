"""Commands of `expo-ray`: parse, call, print."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from expo_ray.cli.arguments import command_parser
from expo_ray.cli.exit_status import FAILED
from expo_ray.cli.extras import missing_extra
from expo_ray.cli.flags import flags_of, with_alphas_joined, with_flags
from expo_ray.cli.plan_table import describe
from expo_ray.config import (
    Job,
    Pair,
    format_alpha,
    job_schema,
    load_job,
    parse_bytes,
    parse_pair,
)
from expo_ray.errors import ExpoError, JobError
from expo_ray.extrapolation.in_threads import InThreads
from expo_ray.extrapolation.plan_job import JobPlan, outputs_of, plan_job
from expo_ray.extrapolation.run_job import Outcome, run_job
from expo_ray.progress import Progress, size_text
from expo_ray.published.verify import read_manifest, rederive, verify_files
from expo_ray.storage import join_uri, local_path, open_store
from expo_ray.storage.uri import check_utf8
from expo_ray.text import remember_url_secrets, shown, shown_end

if TYPE_CHECKING:
    from expo_ray.published.fit import Fit


def run_command_line(words: Sequence[str], flags: list[str]) -> int:
    """Run the command that `words` name; returns its exit status.

    Args:
        flags: receives the names of the flags that the command takes, see `with_flags`.

    Raises:
        SystemExit: if they name none, or ask for help.
        StorageError: for a word that is not UTF-8.
    """
    remember_url_secrets(list(words))
    for word in words:
        check_utf8(word)
    parsed = command_parser().parse_args(with_alphas_joined(words))
    flags += flags_of(parsed)
    try:
        return _COMMANDS[parsed.command](parsed)
    except ModuleNotFoundError as error:
        if parsed.command == "benchmark" and (remedy := missing_extra(error, "benchmark")):
            raise JobError(remedy) from error
        raise


def print_outcome(outcome: Outcome, flags: Collection[str] = ()) -> int:
    """Print the published models and the failures of a job; returns the exit status.

    Args:
        flags: see `with_flags`.
    """
    for model in sorted(outcome.published, key=lambda model: (model.pair, model.alpha)):
        effective = "" if model.effective_alpha is None else f" (effective {model.effective_alpha:.3f})"
        print(f"{model.uri}: alpha {format_alpha(model.alpha)}{effective}, {size_text(model.size)}")
        for warning in model.warnings:
            print(f"  warning: {with_flags(warning, flags)}")
    for name, error in outcome.failures.items():
        print(f"failed: {name}: {with_flags(str(error), flags)}", file=sys.stderr)
    return FAILED if outcome.failures else 0


def _extrapolate(arguments: argparse.Namespace) -> int:
    flags = flags_of(arguments)
    pair = parse_pair(_options_of(arguments), "command line")
    outputs = {
        alpha: arguments.output
        if len(pair.alphas) == 1
        else join_uri(arguments.output, f"alpha={format_alpha(alpha)}")
        for alpha in pair.alphas
    }
    job_plan = plan_job([pair], [outputs], overwrite=arguments.overwrite)
    if arguments.dry_run:
        print(with_flags(describe(job_plan, workers=1, bandwidth=parse_bytes("1GB")), flags))
        return 0
    for note in (note for plan in job_plan.pairs for note in plan.notes):
        print(f"note: {with_flags(note, flags)}", file=sys.stderr)
    with Progress("extrapolate") as progress, InThreads(progress, device=arguments.device) as executor:
        outcome = run_job(job_plan, executor, progress)
    return print_outcome(outcome, flags)


def _plan(arguments: argparse.Namespace) -> int:
    job = load_job(arguments.job)
    print(describe(plan_every_pair(job), workers=arguments.workers, bandwidth=arguments.bandwidth))
    return 0


def plan_every_pair(job: Job, *, overwrite: bool = False) -> JobPlan:
    """Read the headers of all pairs of a job file, and plan their extrapolation.

    Raises:
        Problems: with everything that is wrong with any pair or output.
    """
    return plan_job(job.pairs, [outputs_of(job, pair) for pair in job.pairs], overwrite=overwrite)


def _verify(arguments: argparse.Namespace) -> int:
    from expo_ray.published.fit import fit_alphas  # numpy comes with it

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
            by_token = manifest is not None and manifest["arithmetic"].get("vocab") == "by-token"
            _print_fits(
                *fit_alphas(
                    arguments.folder, *parents, allow_pickle=arguments.allow_pickle, by_token=by_token
                )
            )
        if manifest:
            wrong = rederive(manifest, *parents, allow_pickle=arguments.allow_pickle)
            problems += wrong
            if not wrong:
                print("computed again from both parents: the same bytes")
    for problem in problems:
        print(f"failed: {shown_end(problem, 1000)}", file=sys.stderr)
    return FAILED if problems else 0


def _print_fits(fits: Sequence[Fit], skipped: Sequence[str]) -> None:
    names = [shown(fit.name) for fit in fits]
    width = max(map(len, names))
    print(f"{'tensor':{width}}  {'alpha':>8}  {'delta/weight':>12}  {'residual':>9}")
    for name, fit in zip(names, fits, strict=True):
        print(f"{name:{width}}  {fit.alpha:8.4f}  {fit.relative_delta:12.2e}  {fit.residual:9.2e}")
    for text in skipped:
        print(f"not compared: {shown_end(text, 1000)}")
    moved = [fit for fit in fits if fit.delta_square]
    if moved:
        best = sum(fit.alpha * fit.delta_square for fit in moved) / sum(fit.delta_square for fit in moved)
        least, most = (choose(fit.alpha for fit in moved) for choose in (min, max))
        print(
            f"alpha {best:.4f} fits best over the {len(moved)} tensors with a delta, {least:.4f} to {most:.4f} one by one"
        )
    else:
        print("sft and dpo do not differ in these tensors, so that any alpha fits")


def _report(arguments: argparse.Namespace) -> int:
    from expo_ray.report.report_folder import write_report

    print(write_report(open_store(arguments.run)))
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from expo_ray.published.push import plan_push, push_model
    from expo_ray.storage.hub_push import check_token

    check_token()
    planned = plan_push(arguments.folder, arguments.repo_id)
    print(planned.described(private=arguments.private), flush=True)
    if planned.files and not arguments.dry_run:
        print(f"pushed to {push_model(planned, private=arguments.private)}")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(job_schema(), indent=2))
    return 0


def _options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {
        key: value for key, value in vars(arguments).items() if key in Pair.model_fields and value is not None
    }
    if (path := local_path(arguments.dpo)) is not None:  # `.` and `..` have a name as well
        given["name"] = Pair(sft="-", dpo=str(path)).name
    return given | ({"multipliers": dict(arguments.multiplier)} if arguments.multiplier else {})


def _imported(module: str) -> Callable[[argparse.Namespace], int]:
    """Make a command of a module that takes seconds to import, and is imported when it runs."""

    def command(arguments: argparse.Namespace) -> int:
        return int(importlib.import_module(f"expo_ray.{module}").command(arguments))

    return command


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "extrapolate": _extrapolate, "plan": _plan, "verify": _verify, "report": _report, "push": _push,
    "schema": _schema, "benchmark": _imported("cli.benchmark"),
    "run": _imported("cli.run"), "serve": _imported("cli.serve"), "respond": _imported("cli.respond"), "reward": _imported("cli.reward"),
}  # fmt: skip

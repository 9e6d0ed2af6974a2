"""How long does a local pair take, against copying it, mergekit and the paper's script?

Every way makes the same model from the same two folders, on a warm disk, in turns. The floor reads sft and copies dpo.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.measure import CACHE, EXPO_RAY, Cost, fresh, interleave, median_cost, run, warm
from benchmarks.pair import TINY_LLAMA_LAYERS, Pair, llama_pair
from benchmarks.result import TARGET_HEADER, report, table, target
from benchmarks.work_phase import work_phase

ALPHA = 0.5
FLOOR = "floor: `cat sft/* > /dev/null; cp -r dpo out`"
OURS = "expo-ray, stochastic (the default)"
WORK = "its work phase alone"
NEAREST = "expo-ray, nearest"
NEAREST_WORK = "its work phase alone, nearest"
MERGEKIT = "mergekit `linear`"
TUNED = "mergekit `linear`, tuned"
PAPER = "the paper's script"
# The fastest flags found for mergekit on two cores.
TUNING = ("--async-write", "--write-threads", 2, "--out-shard-size", "500M", "-j", 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small pair; the result is not kept")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (%(default)s)")
    parser.add_argument("--mergekit", type=Path, help="`mergekit-yaml` of an environment that has mergekit")
    parser.add_argument("--paper-script", type=Path, help="`extrapolate.py` of the paper's repository")
    arguments = parser.parse_args()
    pair = llama_pair(2 if arguments.quick else TINY_LLAMA_LAYERS)
    warm(pair.sft, pair.dpo)

    costs = interleave(_ways(pair, arguments), arguments.rounds)
    medians = {name: median_cost(each) for name, each in costs.items()}
    report(
        "local",
        "Local: one pair, two folders to one",
        [
            f"{pair.weight_bytes / 4e9:.2f} B parameters in bf16, sft in 5 files and dpo in 2, warm disk, alpha {ALPHA}; medians of "
            f"{arguments.rounds} runs in turns. expo-ray's figures include sha256, statistics and fsync; the others do none of these.",
            table(HEADER, [_row(name, medians[name], medians[OURS]) for name in medians]),
            table(TARGET_HEADER, list(_targets(medians))),
            _reading(medians, arguments),
        ],
        packages=("torch", "numpy", "numba", "transformers"),
        keep=not arguments.quick,
    )


def _ways(pair: Pair, arguments: argparse.Namespace) -> Mapping[str, Callable[[], Cost]]:
    ways = {
        FLOOR: partial(_into_fresh, "sh", "-c", f"cat {pair.sft}/* > /dev/null; cp -r {pair.dpo} $0"),
        OURS: partial(_into_fresh, *_expo_ray(pair, "stochastic")),
        WORK: partial(_work, pair, "stochastic"),
        NEAREST: partial(_into_fresh, *_expo_ray(pair, "nearest")),
        NEAREST_WORK: partial(_work, pair, "nearest"),
    }
    if arguments.mergekit:
        config = CACHE / "mergekit.yaml"
        config.write_text(_mergekit_config(pair))
        command = (arguments.mergekit.absolute(), config)
        ways[MERGEKIT] = partial(_into_fresh, *command)
        ways[TUNED] = partial(_into_fresh, *command, options=TUNING)
    if arguments.paper_script:
        words = ("--sft_model_path", pair.sft, "--dpo_model_path", pair.dpo, "--alpha", ALPHA, "--save_path")
        ways[PAPER] = partial(_into_fresh, sys.executable, arguments.paper_script.absolute(), *words)
    return ways


def _into_fresh(*command: object, options: Sequence[object] = ()) -> Cost:
    output = fresh("out")
    try:
        return run(*command, output, *options)
    finally:
        fresh("out")


def _work(pair: Pair, rounding: str) -> Cost:
    work = work_phase(pair.sft, pair.dpo, fresh("out"), (ALPHA,), rounding)
    fresh("out")
    return Cost(work.seconds, work.cpu_s, work.peak_rss)


def _expo_ray(pair: Pair, rounding: str) -> Sequence[object]:
    given = ("--sft", pair.sft, "--dpo", pair.dpo, "--alpha", ALPHA, "--rounding", rounding)
    return *EXPO_RAY, "extrapolate", *given, "--output"


def _mergekit_config(pair: Pair) -> str:
    return (
        "merge_method: linear\n"
        "models:\n"
        f"  - {{model: {pair.dpo}, parameters: {{weight: {1 + ALPHA}}}}}\n"
        f"  - {{model: {pair.sft}, parameters: {{weight: {-ALPHA}}}}}\n"
        "parameters: {normalize: false}\n"
        "dtype: bfloat16\n"
    )


HEADER = ("", "wall time", "CPU time", "peak RSS", "wall time / expo-ray's")


def _row(name: str, cost: Cost, ours: Cost) -> Sequence[object]:
    memory = f"{cost.peak_rss / 1e6:.0f} MB" if name != FLOOR else ""
    return name, f"{cost.seconds:.2f} s", f"{cost.cpu_s:.2f} s", memory, f"{cost.seconds / ours.seconds:.2f}"


def _targets(medians: Mapping[str, Cost]) -> Iterator[Sequence[str]]:
    seconds = {name: cost.seconds for name, cost in medians.items()}
    for name, least in ((MERGEKIT, 6.0), (TUNED, 6.0), (PAPER, 4.0)):
        if name in seconds:
            yield target(f"{name} / expo-ray", seconds[name] / seconds[OURS], least, at_most=False)
    yield target("work phase / floor", seconds[WORK] / seconds[FLOOR], 2.0)
    yield target("work phase / floor, nearest", seconds[NEAREST_WORK] / seconds[FLOOR], 2.0)


def _reading(medians: Mapping[str, Cost], arguments: argparse.Namespace) -> str:
    """What the tables say, with their own figures."""
    ours, work = medians[OURS], medians[WORK]
    sentences = [
        f"Of {ours.seconds:.2f} s, {work.seconds:.2f} s are work, at {work.cpu_s / work.seconds:.1f} cores; the rest starts Python, plans and loads "
        f"the compiled arithmetic. Stochastic rounding costs {work.seconds / medians[NEAREST_WORK].seconds - 1:+.0%} of the work phase against nearest."
    ]
    if arguments.mergekit:
        flags = " ".join(map(str, TUNING))
        sentences.append(
            f"mergekit {_version_beside(arguments.mergekit)}, weights {1 + ALPHA} and {-ALPHA}, tuned with `{flags}`."
        )
    if arguments.paper_script:
        sentences.append(f"What ran as the paper's script: {_described(arguments.paper_script)}")
    for option, given in (("--mergekit", arguments.mergekit), ("--paper-script", arguments.paper_script)):
        if not given:
            sentences.append(f"Without {option}, that comparison was left out.")
    return " ".join(sentences)


def _version_beside(mergekit: Path) -> str:
    """The version of mergekit in the environment of its executable."""
    ask = "from importlib.metadata import version; print(version('mergekit'), 'with torch', version('torch'))"
    return subprocess.check_output([mergekit.with_name("python"), "-c", ask], text=True).strip()


def _described(script: Path) -> str:
    text = script.read_bytes()
    summary = (ast.get_docstring(ast.parse(text)) or "no description in it").splitlines()[0]
    return f'`{script.name}`, sha256 {hashlib.sha256(text).hexdigest()[:16]}: "{summary}"'


if __name__ == "__main__":
    main()

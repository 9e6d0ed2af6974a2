"""`expo-ray benchmark`: choose the function by the options that are given."""

from __future__ import annotations

import argparse

from expo_ray.cli.benchmark_judge import examine_judge, grade_mtbench, judge_alpaca
from expo_ray.cli.benchmark_score import score_alpaca, score_leaderboard, score_mtbench, score_pairs
from expo_ray.errors import JobError


def command(arguments: argparse.Namespace) -> int:
    """Run one benchmark; returns the exit status, 1 if judgments are missing.

    Raises:
        ExpoError: everything wrong with the input, before the first question to a judge.
    """
    if arguments.benchmark == "leaderboard":
        return score_leaderboard(arguments)
    if arguments.benchmark == "pairs":
        return score_pairs(arguments)
    if arguments.benchmark == "judge":
        return examine_judge(arguments)
    asked = arguments.outputs if arguments.benchmark == "alpaca" else arguments.answers
    if not asked:
        return score_alpaca(arguments) if arguments.benchmark == "alpaca" else score_mtbench(arguments)
    if not arguments.output:
        raise JobError("--output is missing: a folder for the judgments, in which a second run goes on")
    if arguments.benchmark == "alpaca":
        return judge_alpaca(arguments)
    return grade_mtbench(arguments) or score_mtbench(arguments)

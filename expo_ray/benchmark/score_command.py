"""`expo-ray benchmark` without a judge: scores of judgments and results that exist."""

from __future__ import annotations

import argparse


def score_alpaca(arguments: argparse.Namespace) -> int:
    """Print the win rates of one or two files of annotations; returns the exit status."""
    raise NotImplementedError


def score_mtbench(arguments: argparse.Namespace) -> int:
    """Print MT-Bench's scores of files of judgments; returns the exit status."""
    raise NotImplementedError


def score_leaderboard(arguments: argparse.Namespace) -> int:
    """Print the six scores of the Open LLM Leaderboard and their average; returns the exit status."""
    raise NotImplementedError

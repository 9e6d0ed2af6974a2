"""Run the tasks of a simulation on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def on_all_cores(run: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
    """Run each task in one of a process for each core; returns the results in the order of the tasks.

    Args:
        run: a function of a module; a result follows from its task alone.
    """
    # Matrices are small: a thread per core in each process costs more than it brings, and on a busy machine ten times more. New processes,
    # as numpy reads this when it is imported.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        return list(pool.map(run, tasks, chunksize=max(1, min(20, len(tasks) // (4 * cores)))))

"""Watched tasks on several nodes of this machine, one of which fails or freezes: prints what became of them as a line of JSON.

`python -m tests.support.watched_nodes SCENARIO FOLDER`
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import psutil
import ray

from expo_ray.errors import TransientStorageError
from expo_ray.on_ray import reports, watched_tasks
from expo_ray.on_ray.extrapolation import run_until_cancelled
from expo_ray.on_ray.reports import Reported, Reporting, run_reported
from expo_ray.on_ray.watched_tasks import WatchedTasks
from tests.support.declared_nodes import WAIT_S, Nodes, show

TASKS = 16


def attempt(call: tuple[str, str, int], reporting: Reporting) -> Reported[str]:
    """Do what a scenario asks for, and leave a file for each attempt, named after task and node."""
    what, folder, number = call
    node = ray.get_runtime_context().get_node_id()

    def work() -> str:
        Path(folder, f"{number}-{node}-{time.time_ns()}").write_text(str(os.getpid()))
        bad = Path(folder, "bad").read_text() == node
        if what == "refused" and bad:
            raise TransientStorageError("the store does not answer")
        if what == "stuck" and bad:
            run_until_cancelled(lambda on_bytes: time.sleep(3600))
        if what == "slow":
            run_until_cancelled(move_slowly)
        time.sleep(0.3)
        return node

    return run_reported(work, reporting)


def move_slowly(on_bytes: Callable[[int], None]) -> None:
    for _ in range(20):
        on_bytes(1)
        time.sleep(0.5)


def run_all(
    what: str, folder: Path, tasks: int, disturb: Callable[[], None] = lambda: None
) -> Mapping[str, Any]:
    """Run tasks to their end; returns on which nodes they were done, and where each was begun."""
    watched = WatchedTasks()
    function = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(attempt)
    futures: list[Future[str]] = [
        watched.run(f"task {number}", function, (what, str(folder), number), str, moves=True)
        for number in range(tasks)
    ]
    disturb()
    wait(futures, timeout=WAIT_S)
    done = Counter(future.result(0) for future in futures)
    pids = [int(file.read_text()) for file in folder.glob("*-*-*")]
    began = Counter(file.name.split("-")[1] for file in folder.glob("*-*-*"))
    return {"done": done, "began": began, "pids": pids, "watched": watched}


def set_bad(folder: Path, node: str) -> None:
    folder.mkdir()
    (folder / "bad").write_text(node)


def main(scenario: str, folder: Path) -> None:
    nodes = Nodes()
    node = nodes.add(0, num_cpus=2)
    bad = node.node_id
    if scenario in {"refused", "stuck", "frozen"}:
        nodes.add(0, num_cpus=2)
    set_bad(folder, "" if scenario == "frozen" else bad)
    watched_tasks.LOOK_S, watched_tasks.STALLED_S = 1.0, 6.0
    watched_tasks.LOST_S = watched_tasks._CLEAN_UP_S = 3.0
    reports.BEAT_S = 0.5

    def freeze() -> None:
        """Stop all processes of the node, as a machine does that hangs."""
        time.sleep(4)
        below = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in (below, *below.children(recursive=True)):
            process.send_signal(signal.SIGSTOP)

    result = run_all(
        "slow" if scenario == "frozen" else scenario,
        folder,
        {"stuck": 4, "slow": 2, "frozen": 4}.get(scenario, TASKS),
        freeze if scenario == "frozen" else lambda: None,
    )
    deadline = time.monotonic() + 60
    stuck = result["pids"] if scenario == "stuck" else []
    while stuck and time.monotonic() < deadline:
        time.sleep(0.2)
        stuck = [pid for pid in stuck if _is_attempt(pid)]
    show(done=result["done"], began=result["began"], bad=bad, stuck=len(stuck))
    result["watched"].cancel()
    os._exit(0)  # the frozen node would keep Ray from ending


def _is_attempt(pid: int) -> bool:
    """True if a worker is still in an attempt."""
    try:
        return "attempt" in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    main(sys.argv[1], Path(sys.argv[2]))

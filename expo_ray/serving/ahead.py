"""Make the weights of the step that an engine will probably be swapped to next, while it answers with those of another.

A process of its own does it. A thread would share the interpreter's lock with the engine: at a low priority it would hold the
lock while other processes keep it from running, and at a normal one it would take the engine's time. The process owns the memory
that it fills, so that whoever ends it, the kernel short of memory included, frees all of it.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from expo_ray.arithmetic.sums import refuse_broken
from expo_ray.errors import ExpoError
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import Step, parse_step, stepped
from expo_ray.extrapolation.stream import compute_pages
from expo_ray.serving.host_memory import spare_bytes

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_LOWEST_PRIORITY = 19
# The kernel's first choice when memory is short.
_ENDED_FIRST = "1000"
_PERIOD_S = 1.0
# Pages between two looks at the memory that is left; a look costs a tenth of a page.
_PAGES = 16


class MadeAhead:
    """The weights of at most one step, complete or on the way. All methods return at once.

    Args:
        plan: whose parents are on this node.
    """

    def __init__(self, plan: PairPlan) -> None:
        self._plan = _memory("plan", pickle.dumps(plan))
        self._step: Step | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._memory = -1
        self._ended: list[subprocess.Popen[bytes]] = []

    def begin(self, step: Step) -> None:
        """Start to make the weights of `step`, if memory allows; those of another step are given up."""
        if self._plan is None or step == self._step:
            return
        self.give_up()
        memory = os.memfd_create("weights")
        command = [sys.executable, "-m", __name__, str(step), str(os.getpid()), str(self._plan), str(memory)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(self._plan, memory),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        finally:
            os.close(memory)  # the process has it under the same number
        os.setpriority(os.PRIO_PROCESS, self._process.pid, _LOWEST_PRIORITY)
        self._step, self._memory = step, memory

    def take(self, step: Step) -> Bytes:
        """Take what there is of the weights of `step`, and give up those of another.

        Returns:
            The first bytes of the shards' files, headers included, one after another; none if nothing was made.
        """
        made = np.empty(0, np.uint8)
        if self._process is not None and step == self._step:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                made = _map(f"/proc/{self._process.pid}/fd/{self._memory}")
        self.give_up()
        return made

    def give_up(self) -> None:
        """End the process; what it has made is freed once nobody uses it."""
        if self._process is not None:
            self._process.kill()
            self._ended.append(self._process)
        # Not waited for: on a busy machine its end takes a while at its priority.
        self._ended = [process for process in self._ended if process.poll() is None]
        self._step, self._process = None, None


def _memory(name: str, data: bytes) -> int | None:
    """Put `data` into memory that a process can be given; None where the system has no such memory."""
    if not hasattr(os, "memfd_create"):
        return None
    descriptor = os.memfd_create(name)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    return descriptor


def _map(path: str) -> Bytes:
    descriptor = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(descriptor).st_size
        # Populated: a fault for each of its pages would take as long as a copy.
        mapped = mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE) if size else b""
        return np.frombuffer(mapped, np.uint8)
    finally:
        os.close(descriptor)


def make(plan: PairPlan, alpha: float, memory: int, parent: int) -> None:
    """Write the shards' files at `alpha` into `memory`, one after another, while there is room and the parent process lives.

    Raises:
        ExpoError: if they cannot be computed.
    """
    left = sum(shard.size for shard in plan.shards)
    for index in range(len(plan.shards)):
        for number, page in enumerate(compute_pages(plan, index, [alpha], "cpu")):
            if os.getppid() != parent or (number % _PAGES == 0 and spare_bytes() < left):
                raise SystemExit
            for name, statistics in page.statistics:
                refuse_broken(name, statistics, alpha)
            out = page.outs[0]
            while len(out):
                out = out[os.write(memory, out) :]
            left -= len(page.outs[0])


def main() -> None:
    """Make the weights of a step, and keep them until the parent process takes them or has ended, or memory is short."""
    step, (parent, plan_memory, memory) = parse_step(sys.argv[1]), map(int, sys.argv[2:])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_ENDED_FIRST)
    plan = pickle.loads(os.pread(plan_memory, os.fstat(plan_memory).st_size, 0))
    # Whatever is wrong with the weights is found again by the swap, and said there.
    with suppress(ExpoError):
        make(stepped(plan, step), step.alpha, memory, parent)
        while os.getppid() == parent and spare_bytes() >= 0:
            time.sleep(_PERIOD_S)


if __name__ == "__main__":
    main()

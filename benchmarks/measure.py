"""Measure what a process costs, and compare processes fairly."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "benchmarks"
EXPO_RAY = (sys.executable, "-m", "expo_ray.cli")


@dataclass(frozen=True)
class Cost:
    """Resources that a process used.

    Attributes:
        seconds: wall time, start-up included.
        cpu_s: user and system time of all its threads.
        peak_rss: bytes.
        output: what it printed on stdout.
    """

    seconds: float
    cpu_s: float
    peak_rss: int
    output: str = ""


def run(*command: object) -> Cost:
    """Run a command to its end, in the repository's folder.

    Raises:
        RuntimeError: if it fails; with what it printed.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        os.sync()  # what earlier runs left in the page cache is not written back on this one's time
        touch_free_memory()
        started = time.monotonic()
        process = subprocess.Popen(words, stdout=stdout, stderr=stderr, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen need not wait again
        printed, errors = (_all_of(file) for file in (stdout, stderr))
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} exited with {process.returncode}:\n{errors[-3000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, printed)


def touch_free_memory(size: int = 4 << 30) -> None:
    """Make free memory cheap to take.

    A virtual machine hands memory that is freed back to its host; taking it again costs up to 2 s a GiB, and whichever
    process happens to be next would pay.
    """
    # In a process of its own: the peak RSS of whoever starts a command counts as the command's.
    touch = f"import mmap, numpy; numpy.frombuffer(mmap.mmap(-1, {size}), numpy.uint8)[::4096] = 1"
    subprocess.run([sys.executable, "-c", touch], check=True)


def _all_of(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def interleave(variants: Mapping[str, Callable[[], Cost]], rounds: int) -> dict[str, list[Cost]]:
    """Every variant once per round, so that a change of the machine's mood meets them all."""
    costs: dict[str, list[Cost]] = {name: [] for name in variants}
    for number in range(1, rounds + 1):
        for name, variant in variants.items():
            costs[name].append(variant())
            print(f"round {number}: {name}: {costs[name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    return costs


def median_cost(costs: Sequence[Cost]) -> Cost:
    """The median of each figure by itself."""
    return Cost(
        statistics.median(cost.seconds for cost in costs),
        statistics.median(cost.cpu_s for cost in costs),
        int(statistics.median(cost.peak_rss for cost in costs)),
    )


def warm(*folders: Path) -> None:
    """Read every file once, so that all variants find them in the page cache."""
    buffer = bytearray(1 << 20)
    for path in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def fresh(name: str) -> Path:
    """A path below the cache where nothing is."""
    path = CACHE / name
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

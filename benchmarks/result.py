"""Write a result as Markdown with date, machine, versions and command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from expo_ray import __version__

RESULTS = Path(__file__).resolve().parent / "results"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def target(name: str, value: float, bound: float, *, at_most: bool = True, unit: str = "x") -> Sequence[str]:
    """Row of a table of targets: name, measured value, bound, and `met` or `missed`."""
    holds = value <= bound if at_most else value >= bound
    sign = "at most" if at_most else "at least"
    return name, f"{value:.3g}{unit}", f"{sign} {bound:g}{unit}", "met" if holds else "**missed**"


TARGET_HEADER = ("", "measured", "wanted", "")


def report(
    question: str, title: str, sections: Sequence[str], *, packages: Sequence[str] = (), keep: bool
) -> None:
    """Print a result, and write it to `results/<question>.md` if it is to be kept.

    Args:
        packages: whose versions matter beside expo-ray's.
        keep: False for a trial with reduced sizes.
    """
    head = [
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- machine: {_machine()}",
        f"- versions: expo-ray {__version__}, Python {platform.python_version()}"
        + "".join(f", {name} {_version(name)}" for name in packages),
        f"- command: `{_command(question)}`",
    ]
    text = "\n\n".join([f"# {title}", "\n".join(head), *sections]) + "\n"
    print(text)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{question}.md").write_text(text)


def _command(question: str) -> str:
    # Without the folders of this machine, which another reader has to replace anyway.
    words = [word if word.startswith("-") else Path(word).name for word in sys.argv[1:]]
    return shlex.join(["python", "-m", "benchmarks", question, *words])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> str:
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    name = models[0].partition(":")[2].strip() if models else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{os.cpu_count()} cores ({name}), {memory / 2**30:.0f} GiB, {platform.system()} {platform.release()}"
    )

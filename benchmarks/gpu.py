"""What does a GPU do with this project: are its bits the CPU's, and where is it worth its price?

Needs torch, Triton, numba and transformers, and neither Ray nor vLLM. A part that cannot run is named with its reason, and the
others run. `--quick` runs everything small, on a CPU as well: there the kernel needs Triton's interpreter (TRITON_INTERPRET=1).
The result is kept only if it comes from a GPU and from whole sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.measure import CACHE
from benchmarks.result import report, table

# In the order of the result; `measurement` finds the function of each.
PARTS = ("copies", "bits", "kernel", "command", "swap", "rewards")


@dataclass
class Findings:
    """Rows of the result by part, and why parts could not run.

    Attributes:
        differences: what is not as the CPU has it; any makes the exit status 1.
    """

    rows: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    not_run: list[tuple[str, str]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def add(self, part: str, name: str, value: str) -> None:
        self.rows.setdefault(part, []).append((name, value))
        print(f"{part}: {name}: {value}", file=sys.stderr, flush=True)

    def compare(self, part: str, name: str, *, equal: bool) -> None:
        self.add(part, name, "equal" if equal else "**not equal**")
        if not equal:
            self.differences.append(f"{part}: {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, also on a CPU; the result is not kept"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    arguments = parser.parse_args()
    import torch

    on_gpu = torch.cuda.is_available()
    if not (on_gpu or arguments.quick):
        parser.error("torch finds no GPU here (see `nvidia-smi`); `--quick` runs everything small on the CPU")
    findings = measure(arguments.only, on_gpu=on_gpu, quick=arguments.quick)
    name = torch.cuda.get_device_name() if on_gpu else "no GPU: a dry run, its times mean nothing"
    report(
        "gpu",
        f"One GPU: {name}",
        list(sections(findings)),
        packages=("torch", "triton", "numba", "transformers"),
        keep=on_gpu and not arguments.quick and set(arguments.only) == set(PARTS),
    )
    if findings.differences or any(reason.startswith("failed") for _, reason in findings.not_run):
        sys.exit(1)


def measure(parts: Sequence[str], *, on_gpu: bool, quick: bool) -> Findings:
    """Run the parts one after another; one that fails is named with its reason."""
    findings = Findings()
    CACHE.mkdir(parents=True, exist_ok=True)
    for part in parts:
        started = time.monotonic()
        try:
            measurement(part)(findings, on_gpu, quick)
        except ImportError as error:
            findings.not_run.append((part, f"a package is missing: {error}"))
        except NotHere as error:
            findings.not_run.append((part, str(error)))
        except Exception as error:
            findings.not_run.append((part, f"failed: {type(error).__name__}: {error}"))
        print(f"{part}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return findings


class NotHere(Exception):
    """A part that this machine cannot run; the text says why."""


def measurement(part: str) -> Callable[[Findings, bool, bool], None]:
    """The function that measures a part; what it needs is imported only then."""
    if part == "rewards":
        from benchmarks.gpu_rewards import measure_rewards

        return measure_rewards
    from benchmarks import gpu_kernel

    function: Callable[[Findings, bool, bool], None] = getattr(gpu_kernel, f"measure_{part}")
    return function


def sections(findings: Findings) -> Sequence[str]:
    """The result as Markdown."""
    texts = [f"## {part}\n\n{table(('', 'measured'), rows)}" for part, rows in findings.rows.items()]
    if findings.not_run:
        texts.append("## not run\n\n" + "\n".join(f"- {part}: {reason}" for part, reason in findings.not_run))
    return texts

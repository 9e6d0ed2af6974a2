"""The whole pipeline on machines made of namespaces, submitted with a token, while one of them is lost: what it costs, what comes out.

`benchmarks/machines.py` prints the table; `tests/cluster/test_machines.py` checks what must not change.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.local_s3 import SeaweedFS
from tests.support.chat_models import save_pair_that_learned
from tests.support.machines import Machine, Machines
from tests.support.paths import ROOT
from tests.support.ray_cluster import Process, wait_until
from tests.support.stage import upload
from tests.support.tiny_reward_models import save_reward_model

PATIENCE_S = 280.0
LETTER = "a"
PAIRS = ("one", "two")
REWARD = f"""
def share(prompt: str, response: str) -> float:
    return response.count({LETTER!r}) / max(1, len(response))
"""


@dataclass(frozen=True)
class Case:
    """A loss, and the moment for it.

    Attributes:
        moment: true once it is time, of the job's output so far and its folder in the bucket.
        act: what is lost.
        again: the job is submitted once more.
    """

    moment: Callable[[Run], object] | None = None
    act: Callable[[Machines, Machine], None] | None = None
    again: bool = False


@dataclass
class Run:
    """One submission of the job, or two, and what it left in the bucket.

    Attributes:
        seconds: from the first submission to the last end.
        statuses: exit status of each submission.
        lost: rows that were made, and not stored when a job ended with its head, by kind.
        shards_twice: shards that were written more than once.
    """

    server: SeaweedFS
    uri: str
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    statuses: list[int] = field(default_factory=list)
    process: Process | None = None
    lost: dict[str, int] = field(default_factory=dict)
    shards_twice: int = 0

    @property
    def log(self) -> str:
        return self.process.stdout + self.process.stderr if self.process else ""

    def keys(self, pattern: str = "") -> list[str]:
        prefix = self.uri.removeprefix(f"s3://{self.server.bucket}/")
        pages = self.server.client().get_paginator("list_objects_v2").paginate(Bucket=self.server.bucket, Prefix=prefix)  # fmt: skip
        keys = [
            entry["Key"].removeprefix(f"{prefix}/") for page in pages for entry in page.get("Contents", [])
        ]
        return [key for key in keys if re.search(pattern, key)]

    def read(self, key: str) -> bytes:
        full = f"{self.uri.removeprefix(f's3://{self.server.bucket}/')}/{key}"
        data: bytes = self.server.client().get_object(Bucket=self.server.bucket, Key=full)["Body"].read()
        return data

    def rows(self, kind: str) -> Counter[tuple[str, str, int]]:
        """How often each response or reward is stored, by served model (and reward model), prompt and sample."""
        counted = Counter[tuple[str, str, int]]()
        for key in self.keys(rf"^evaluation/[^/]+/[^/]+/{kind}/.*\.jsonl$"):
            parts = key.split("/")
            for row in map(json.loads, self.read(key).decode().strip().split("\n")):
                counted["/".join([parts[1], *parts[4:-1]]), row["prompt_id"], row["sample"]] += 1
        return counted

    def twice(self, kind: str) -> int:
        """Rows that were stored more than once."""
        return sum(self.rows(kind).values()) - len(self.rows(kind))

    def status(self) -> Mapping[str, Any]:
        """`status.json`."""
        status: dict[str, Any] = (
            json.loads(self.read("status.json")) if "status.json" in self.keys("^status") else {}
        )
        return status

    def results(self) -> Mapping[str, Any]:
        results: dict[str, Any] = json.loads(self.read("results.json"))
        return results

    def decisions(self) -> dict[str, tuple[float, str]]:
        """The alpha of each pair, and the reason, with its figures."""
        return {pair["name"]: (pair["decision"], pair["reason"]) for pair in self.results()["pairs"]}

    def digests(self) -> dict[str, str]:
        """SHA-256 of every published file that does not tell when or where it was made."""
        keys = self.keys(r"^pairs/.*/alpha=[^/]*/[^/]+$")
        return {
            key: hashlib.sha256(self.read(key)).hexdigest()
            for key in keys
            if not key.endswith(("README.md", "expo.json"))
        }


class PipelineMachines(Machines):
    """Machines, and a job of two pairs and two reward models whose parents and output are in the bucket."""

    def __init__(self, server: SeaweedFS, folder: Path) -> None:
        super().__init__(server, VLLM_CPU_KVCACHE_SPACE="1")
        # In memory, and lost with its machine.
        self.environment["EXPO_RAY_CACHE"] = str(self.ray_folder / "cache")
        self._folder, self._bucket, self.checkout = folder, server, folder / "checkout"
        self._places: dict[str, Any] = {}

    def prepare(self) -> None:
        """Put the parents and a reward model into the bucket, and the code that is submitted into a folder."""
        pairs = []
        for seed, name in enumerate(PAIRS, 2):
            parents = save_pair_that_learned(LETTER, self._folder / name, seed=seed)
            sft, dpo = (upload(self._bucket, parent, f"machines/{name}/{parent.name}") for parent in parents)
            pairs.append({"name": name, "sft": sft, "dpo": dpo, "alphas": [0.5]})
        reward = upload(self._bucket, save_reward_model(self._folder / "second"), "machines/second")
        self._places = {"pairs": pairs, "second": reward}
        for part in ("expo_ray", "jobs"):
            shutil.copytree(ROOT / part, self.checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
        (self.checkout / "letter_reward.py").write_text(REWARD)
        (self.checkout / "prompts.txt").write_text("".join(f"Spell the number {i}.\n" for i in range(64)))

    def job_file(self, uri: str, *names: str) -> str:
        """Write the job of some pairs, all unless named, into the submitted folder; returns its name there."""
        job = {
            "output": uri,
            "pairs": [pair for pair in self._places["pairs"] if not names or pair["name"] in names],
            "prompts": [{"name": "letters", "source": "prompts.txt"}],
            "sampling": {"max_tokens": 48},
            "serving": {"port": 0, "max_model_len": 128},
            "rewards": [
                {"name": "letter", "model": "python:letter_reward:share", "num_cpus": 0.5},
                {
                    "name": "second",
                    "model": self._places["second"],
                    "backend": "transformers",
                    "num_cpus": 0.5,
                    "margin": 1.0,
                },
            ],
            "search": {"method": "grid", "alphas": [0.5, 1], "prompts": [24]},
            "publish": "all",  # so that there are bytes to compare, whatever is chosen
        }
        name = f"{'-'.join(names) or 'all'}.yaml"
        (self.checkout / name).write_text(yaml.safe_dump(job))
        return name

    def begin(self, name: str, *pairs: str, flags: Sequence[str] = ()) -> Run:
        """Submit the job of some pairs, with an output of its own."""
        run = Run(self._bucket, f"s3://{self._bucket.bucket}/machines-out/{name}")
        run.process = self.submit(
            self.checkout, "jobs/pipeline.py", self.job_file(run.uri, *pairs), flags=flags
        )
        return run

    def run_case(self, name: str, case: Case, *flags: str) -> Run:
        """Submit the job, lose what the case loses at its moment, and wait for the end."""
        self.way.inject()
        run = self.begin(name, flags=flags)
        assert run.process
        if case.moment and case.act:
            moment, process = case.moment, run.process
            wait_until(lambda: moment(run) or not process.running, "its moment has come", PATIENCE_S)
            assert process.running, run.log[-4000:]
            status = run.status()
            case.act(self, self.engine_worker())
            if case.again:
                made = {kind: status.get(kind, {}).get("done", 0) for kind in ("responses", "rewards")}
                run.lost = {kind: max(0, count - len(run.rows(kind))) for kind, count in made.items()}
        run.statuses.append(run.process.wait(2 * PATIENCE_S))
        if case.again:
            run.process = self.submit(self.checkout, "jobs/pipeline.py", self.job_file(run.uri))
            run.statuses.append(run.process.wait(2 * PATIENCE_S))
        run.seconds = time.monotonic() - run.began
        written = self.way.count("PUT", rf"{name}/pairs/.*safetensors")
        run.shards_twice = sum(written.values()) - len(written)
        return run

    def engine_worker(self) -> Machine:
        """A worker on which an engine runs or starts; any if none does."""
        return next((worker for worker in self.workers if worker.runs("Server:")), self.workers[0])


def row_of(name: str, run: Run, undisturbed: Run) -> tuple[str, ...]:
    """A row of the table: what a loss cost, and whether the outcome is that of the undisturbed run."""
    same = run.decisions() == undisturbed.decisions(), run.digests() == undisturbed.digests()
    return (
        name, f"{run.seconds:.0f} s", f"{run.seconds - undisturbed.seconds:+.0f} s", ", then ".join(map(str, run.statuses)),
        str(run.twice("responses")), str(run.lost.get("responses", 0)), str(run.twice("rewards")), str(run.lost.get("rewards", 0)),
        str(run.shards_twice), *("the same" if each else "**others**" for each in same),
    )  # fmt: skip


def kill_and_replace(machines: Machines, worker: Machine) -> None:
    """A worker loses its power, and another takes its place, as on a cluster that keeps its size."""
    worker.kill()
    machines.replace_lost()


def cut_for_a_minute(machines: Machines, worker: Machine) -> None:
    """A worker loses its cable for 60 s."""
    worker.cut()
    time.sleep(60)
    worker.heal()
    worker.lost = not worker.ray.running


def lose_the_head(machines: Machines, worker: Machine) -> None:
    """The head loses its power, and a new cluster is made."""
    machines.make_cluster()


def starting(run: Run) -> object:
    return "starting 1 engine(s) of one" in run.log


def answering(run: Run) -> object:
    return run.keys(r"/responses/")


def swapping(run: Run) -> object:
    """The responses of one weight are all there, and those of the next are not."""
    served = {key.split("/")[1] for key in run.keys(r"/responses/")}
    return served and len(run.rows("responses")) >= 24


def scoring(run: Run) -> object:
    return run.keys(r"/rewards/.*jsonl")


CASES: Mapping[str, Case] = {
    "undisturbed": Case(),
    "a worker killed while its engine starts": Case(starting, kill_and_replace),
    "a worker killed while its engine answers": Case(answering, kill_and_replace),
    "a worker killed about the time of a swap": Case(swapping, kill_and_replace),
    "a worker killed while rewards are made": Case(scoring, kill_and_replace),
    "a worker cut off for 60 s": Case(answering, cut_for_a_minute),
    "the head killed, the same job on a new cluster": Case(answering, lose_the_head, again=True),
}

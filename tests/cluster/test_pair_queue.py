"""The whole pipeline on a cluster whose machines are late: pairs one after the other, one of which no engine can serve."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chat_models import save_pair_that_learned
from tests.support.ray_cluster import Process, RayHead, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(1800)]

PATIENCE_S = 900.0
LETTER = "a"
LONGEST_REASON = 300
REWARD = f"""
def share(prompt: str, response: str) -> float:
    return response.count({LETTER!r}) / max(1, len(response))
"""


class LateCluster(RayHead):
    """A head without CPUs, where jobs are started, and workers that join later."""

    def __init__(self, code: Path) -> None:
        super().__init__(0)
        self._code = code

    def join(self, num_cpus: int) -> None:
        """Start a worker, and wait until it has joined."""
        words = ("join", json.dumps(self.environment["RAY_ADDRESS"]), json.dumps(num_cpus))
        path = f"{self.environment['PYTHONPATH']}:{self._code}"
        worker = self.run(sys.executable, "-m", "tests.support.declared_nodes", *words, PYTHONPATH=path)
        wait_until(lambda: "joined" in worker.stdout or not worker.running, "the worker is up")
        assert worker.running, worker.stderr

    def pipeline(self, job: Path) -> Process:
        path = f"{self.environment['PYTHONPATH']}:{self._code}"
        return self.run(sys.executable, "-m", "expo_ray.cli", "run", str(job), PYTHONPATH=path)

    def applications(self) -> list[str]:
        """Names of the applications that Serve still has."""
        ask = "import json, ray; from ray import serve; ray.init(); print(json.dumps([*serve.status().applications]))"
        asked = subprocess.run(
            [sys.executable, "-c", ask], env=self.environment, capture_output=True, text=True, check=True
        )
        names: list[str] = json.loads(asked.stdout.splitlines()[-1])
        return names


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LateCluster]:
    (tmp_path / "letter_reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("".join(f"Spell the number {i}.\n" for i in range(64)))
    with LateCluster(tmp_path) as cluster:
        yield cluster


def save_job(folder: Path) -> Path:
    """A job of three pairs, the first of an architecture that vLLM does not know."""
    pairs = []
    for name in ("unheard", "plain", "other"):
        sft, dpo = save_pair_that_learned(LETTER, folder / name, seed=2)
        pairs.append({"name": name, "sft": str(sft), "dpo": str(dpo)})
    for side in ("sft", "dpo"):
        file = folder / "unheard" / side / "config.json"
        config: dict[str, Any] = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"architectures": ["UnheardOfForCausalLM"]}))
    job = {
        "output": str(folder / "out"),
        "pairs": pairs,
        "prompts": [{"name": "letters", "source": str(folder / "prompts.txt")}],
        "sampling": {"max_tokens": 12},
        "serving": {"port": 0, "max_model_len": 128},
        "rewards": [{"name": "letter", "model": "python:letter_reward:share", "num_cpus": 0.5}],
        "search": {"method": "grid", "alphas": [0.5, 1], "prompts": [24]},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


def test_a_pair_that_no_engine_can_serve_fails_alone_on_a_cluster_whose_workers_are_late(
    cluster: LateCluster, tmp_path: Path
) -> None:
    process = cluster.pipeline(save_job(tmp_path))
    wait_until(
        lambda: "waiting for machines" in process.stderr or not process.running, "the job waits", PATIENCE_S
    )
    assert process.running, process.stderr
    assert "the cluster has 0 CPUs; the engines of one pair take 1" in process.stderr
    cluster.join(num_cpus=2)
    wait_until(lambda: not process.running, "the pipeline has ended", PATIENCE_S)
    assert process.wait() == 1, process.stderr[-4000:]

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["failures"].keys() == {"unheard"}
    assert "UnheardOfForCausalLM" in results["failures"]["unheard"]
    assert len(results["failures"]["unheard"]) < LONGEST_REASON, "the reason, and not all that vLLM knows"
    decisions = {pair["name"]: pair["decision"] for pair in results["pairs"]}
    assert decisions.keys() == {"plain", "other"}
    for pair in results["pairs"]:
        assert pair["decision"] > 0, pair["reason"]
        (model,) = map(Path, pair["published"].values())
        assert (model / "expo.json").exists()
    assert (tmp_path / "out" / "report" / "index.html").exists()
    devices = json.loads((tmp_path / "out" / "evaluation" / "devices.json").read_text())
    assert devices == {"engines": "cpu", "rewards": "cpu"}
    # Its own applications are gone, and Serve is there for other jobs.
    assert cluster.applications() == []

    # The same job again does what is missing and nothing else: one engine is tried, and fails again.
    again = cluster.pipeline(tmp_path / "job.yaml")
    wait_until(lambda: not again.running, "the pipeline has ended again", PATIENCE_S)
    assert again.wait() == 1, again.stderr[-4000:]
    assert "plain: its search is stored" in again.stderr
    assert "joining the Ray Serve" in again.stderr
    assert "starting 1 engine(s) of plain" not in again.stderr

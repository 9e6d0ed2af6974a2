"""The pipeline on GPUs that Ray is told of and that are not there: real places, real engines and actors, which compute on CPUs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chat_models import save_pair_that_learned
from tests.support.paths import ROOT
from tests.support.ray_cluster import RayBox, wait_until
from tests.support.tiny_reward_models import save_reward_model

pytestmark = [pytest.mark.cluster, pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]

PATIENCE_S = 400.0
GB = 10**9


class DeclaredGpus:
    """A job of a tiny pair and two tiny reward models.

    Attributes:
        lines: what Ray gave to engines and actors, in order, see `tests.support.declared_gpus`.
    """

    def __init__(self, folder: Path, box: RayBox) -> None:
        self.folder, self.box = folder, box
        save_pair_that_learned("a", folder)
        (folder / "prompts.txt").write_text("".join(f"Spell the number {i}.\n" for i in range(48)))
        rewards = [
            {
                "name": name,
                "model": str(save_reward_model(folder / name)),
                "num_cpus": 0.1,
                "dtype": "fp32",
                "backend": "transformers",
            }
            for name in ("first", "second")
        ]
        job = {
            "output": str(folder / "out"),
            "pairs": [{"name": "tiny", "sft": str(folder / "sft"), "dpo": str(folder / "dpo")}],
            "prompts": [{"name": "letters", "source": str(folder / "prompts.txt")}],
            "sampling": {"max_tokens": 8},
            "serving": {"port": 0, "max_model_len": 128, "replicas": 4},
            "rewards": rewards,
            "search": {"method": "grid", "alphas": [0.5], "prompts": [20]},
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(job))

    def run(self, many: int, gpu_bytes: int) -> list[dict[str, Any]]:
        """Run the job; returns what was reported."""
        script, report = ROOT / "tests" / "support" / "declared_gpus.py", self.folder / "report"
        words = [str(many), str(gpu_bytes), str(report), str(self.folder / "job.yaml")]
        process = self.box.run(sys.executable, str(script), *words)
        wait_until(lambda: not process.running, "the pipeline has finished", PATIENCE_S)
        self.log = process.stderr
        assert process.wait() == 0, process.stdout + process.stderr
        return [json.loads(line) for line in report.read_text().splitlines()]

    def pop_search(self) -> Any:
        """Remove what the run has written; returns alphas and statistics of its search."""
        (pair,) = json.loads((self.folder / "out" / "results.json").read_text())["pairs"]
        shutil.rmtree(self.folder / "out")
        (self.folder / "report").unlink()
        return pair["decision"], pair["reason"], pair["measured"]


@pytest.fixture
def declared(tmp_path: Path) -> Iterator[DeclaredGpus]:
    with RayBox() as box:
        yield DeclaredGpus(tmp_path, box)


def test_one_gpu_holds_the_engine_and_both_reward_models(declared: DeclaredGpus) -> None:
    lines = declared.run(1, 6 * GB)
    (arguments,) = (line for line in lines if line["kind"] == "arguments")
    assert arguments["gpu_memory_utilization"] == pytest.approx(0.92 * 0.6)
    assert "max_num_seqs" not in arguments
    actors = [line for line in lines if line["kind"] == "actor"]
    assert {actor["model"]: (actor["share"], actor["gpus"]) for actor in actors} == {
        "first": (0.2, ["0"]),
        "second": (0.2, ["0"]),
    }
    (groups,) = (line for line in lines if line["kind"] == "groups")
    assert sorted(groups["groups"]) == [
        ["PACK", [{"CPU": 0.1, "GPU": 0.2}] * 2],
        ["STRICT_PACK", [{"GPU": 0.6}]],
    ]
    assert groups["slots"] == 2 * 32  # of the one engine, which on CPUs works on 32 requests
    assert "tiny: 1 engine(s), 0.6 of a GPU" in declared.log
    assert "1 of 4, as more do not fit" in declared.log


def test_by_turns_on_a_gpu_that_holds_one_of_them_the_search_ends_as_beside_each_other(
    declared: DeclaredGpus,
) -> None:
    declared.run(1, 6 * GB)
    beside = declared.pop_search()
    lines = declared.run(1, int(1.5 * GB))  # each needs a little more than 1 GB
    assert "the engines and the reward models take turns" in declared.log
    assert declared.pop_search() == beside
    assert {line["share"] for line in lines if line["kind"] == "actor"} == {1}
    assert {line["gpu_memory_utilization"] for line in lines if line["kind"] == "arguments"} == {0.92}
    starts = [line["kind"] for line in lines if line["kind"] in {"engine", "actor"}]
    rounds = "".join("E" if kind == "engine" else "a" for kind in starts)
    # Both reward models follow the engine in each round.
    assert re.fullmatch("E(Eaa)+E?", rounds) or re.fullmatch("(Eaa)+E?", rounds), rounds
    assert rounds.count("a") >= 4

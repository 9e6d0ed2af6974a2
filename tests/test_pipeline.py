"""`expo-ray run` from end to end: real engine, real actors, killed at each stage and run again."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.chat_models import save_chat_pair
from tests.ray_cluster import Process, RayBox, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

PATIENCE_S = 240.0
# Requests that one engine works on at once, and the client keeps waiting for it; see `Client.concurrency`.
IN_FLIGHT = 32 + 8
REWARD = """
def vowels(prompt: str, response: str) -> float:
    return sum(letter in "aeiouAEIOU" for letter in response) / max(1, len(response))
"""


class Run:
    """One output folder, and the job that fills it."""

    def __init__(self, folder: Path, box: RayBox, name: str) -> None:
        self.box, self.folder, self.output = box, folder, folder / name
        job = {
            "output": str(self.output),
            "publish": "all",
            "pairs": [
                {"name": "tiny", "sft": str(folder / "sft"), "dpo": str(folder / "dpo"), "alphas": [0.25]}
            ],
            "prompts": [{"name": "letters", "source": str(folder / "prompts.txt")}],
            "sampling": {"max_tokens": 12, "samples": 2},
            "serving": {"port": 0, "max_model_len": 128},
            "rewards": [{"name": "vowels", "model": "python:vowels_reward:vowels", "num_cpus": 0.5}],
            "search": {"method": "grid", "alphas": [0.5, 1], "prompts": [24]},
        }
        self.job = folder / f"{name}.yaml"
        self.job.write_text(yaml.safe_dump(job))

    def start(self) -> Process:
        command = (sys.executable, "-m", "expo_ray.cli", "run", str(self.job))
        path = f"{self.box.environment['PYTHONPATH']}:{self.folder}"
        return self.box.run(*command, PYTHONPATH=path)

    def finish(self) -> str:
        """Run to the end; what it told."""
        process = self.start()
        wait_until(lambda: not process.running, "the pipeline has finished", PATIENCE_S)
        assert process.wait() == 0, process.stderr
        return process.stdout + process.stderr

    def kill_when(self, pattern: str, what: str) -> None:
        """SIGKILL the driver once a file of that pattern is there, and all that it started."""
        process = self.start()
        wait_until(lambda: self.files(pattern) or not process.running, what, PATIENCE_S)
        assert process.running, process.stderr
        started = process.descendants()
        process.signal(signal.SIGKILL)
        process.wait()
        for one in started:
            if one.is_running():
                one.kill()

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.output.glob(pattern))

    def rows(self, kind: str) -> Counter[tuple[str, str, int]]:
        """How often each response or reward is stored, by served model, prompt and sample."""
        return Counter(
            (path.relative_to(self.output).parts[1], row["prompt_id"], row["sample"])
            for path in self.files(f"evaluation/*/*/{kind}/**/*.jsonl")
            for row in map(json.loads, path.read_text().split("\n")[:-1])
        )

    @property
    def result(self) -> dict[str, Any]:
        (pair,) = json.loads((self.output / "results.json").read_text())["pairs"]
        return dict(pair)


@pytest.fixture
def box() -> Iterator[RayBox]:
    with RayBox(VLLM_CPU_KVCACHE_SPACE="1") as box:
        yield box


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_chat_pair(tmp_path, tied=True, dtype=torch.float32)
    (tmp_path / "vowels_reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("".join(f"Spell the number {i}.\n" for i in range(64)))
    return tmp_path


def test_a_pipeline_that_is_killed_at_each_stage_comes_to_the_same_end(folder: Path, box: RayBox) -> None:
    whole, broken = Run(folder, box, "whole"), Run(folder, box, "broken")
    whole.finish()

    # In the search: nothing that is stored is asked or scored again, beyond what was in flight.
    broken.kill_when("evaluation/tiny@*/*/rewards/*/*.jsonl", "some responses are scored")
    before = broken.rows("responses")
    told = broken.finish()
    assert "starting 1 engine(s)" in told
    for kind in ("responses", "rewards"):
        assert set(broken.rows(kind)) == set(whole.rows(kind))
        assert sum(broken.rows(kind).values()) - len(broken.rows(kind)) <= IN_FLIGHT
    assert before <= broken.rows("responses")
    assert broken.result["decision"] == whole.result["decision"]

    # While publishing: the search is not begun again, and shards that are stored stay.
    decided, rows = broken.result, broken.rows("responses")
    shutil.rmtree(broken.output / "pairs")
    broken.kill_when("pairs/*/*/.expo/claim.json", "an output is claimed")
    told = broken.finish()
    assert "its search is stored" in told
    assert "engine" not in told
    assert broken.rows("responses") == rows
    assert broken.result["published"] == decided["published"] != {}
    for folder_of_model in broken.result["published"].values():
        assert Path(folder_of_model, "expo.json").exists()

    # While reporting: the page is drawn from what is stored.
    page = broken.output / "report" / "index.html"
    drawn = page.read_text()
    page.unlink()
    (broken.output / "results.json").unlink()
    broken.finish()
    assert broken.rows("responses") == rows
    assert len(page.read_text()) > len(drawn) / 2
    assert broken.result["measured"] == decided["measured"]

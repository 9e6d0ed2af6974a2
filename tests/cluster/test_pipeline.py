"""`expo-ray run` from end to end: real engine, real actors, killed at each stage and run again."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chat_models import save_pair_that_learned
from tests.support.hub_server import TOKEN, HubServer
from tests.support.ray_cluster import Process, RayBox, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]

PATIENCE_S = 1200.0
# Requests that one engine works on at once, and the client keeps waiting for it; see `Client.concurrency`.
IN_FLIGHT = 32 + 8
LETTER = "a"
REWARD = f"""
def share(prompt: str, response: str) -> float:
    return response.count({LETTER!r}) / max(1, len(response))
"""
REPOSITORY = "org/tiny-expo"


class Run:
    """An output folder, and the job that fills it."""

    def __init__(self, folder: Path, box: RayBox, name: str) -> None:
        self.box, self.folder, self.output = box, folder, folder / name
        job = {
            "output": str(self.output),
            "pairs": [{"name": "tiny", "sft": str(folder / "sft"), "dpo": str(folder / "dpo")}],
            "prompts": [{"name": "letters", "source": str(folder / "prompts.txt")}],
            "sampling": {"max_tokens": 12, "samples": 2},
            "serving": {"port": 0, "max_model_len": 128},
            "rewards": [{"name": "letter", "model": "python:letter_reward:share", "num_cpus": 0.5}],
            "search": {"method": "grid", "alphas": [0.5, 1], "prompts": [24]},
            "push_to": "org/{pair}-expo",
        }
        self.job = folder / f"{name}.yaml"
        self.job.write_text(yaml.safe_dump(job))

    def start(self) -> Process:
        command = (sys.executable, "-m", "expo_ray.cli", "run", str(self.job))
        path = f"{self.box.environment['PYTHONPATH']}:{self.folder}"
        return self.box.run(*command, PYTHONPATH=path)

    def finish(self) -> str:
        """Run to the end; returns what it printed."""
        process = self.start()
        wait_until(lambda: not process.running, "the pipeline has finished", PATIENCE_S)
        assert process.wait() == 0, process.stderr
        return process.stdout + process.stderr

    def kill_when(self, condition: Callable[[], object], what: str) -> None:
        """SIGKILL the driver once a condition holds, and all that it started."""
        process = self.start()
        wait_until(lambda: condition() or not process.running, what, PATIENCE_S)
        assert process.running, process.stderr
        started = process.descendants()
        process.signal(signal.SIGKILL)
        process.wait()
        for child in started:
            if child.is_running():
                child.kill()

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.output.glob(pattern))

    def rows(self, kind: str) -> Counter[tuple[str, str, int]]:
        """Count how often each response or reward is stored, by served model, prompt and sample."""
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
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def box(hub: HubServer) -> Iterator[RayBox]:
    # hf_xet speaks its own protocol to its own servers.
    with RayBox(
        VLLM_CPU_KVCACHE_SPACE="1", HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1"
    ) as box:
        yield box


def pushed(hub: HubServer) -> dict[str, bytes]:
    repository = hub.repositories[REPOSITORY]
    return dict(repository.files[repository.branches["main"]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pair_that_learned(LETTER, tmp_path)
    (tmp_path / "letter_reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("".join(f"Spell the number {i}.\n" for i in range(64)))
    return tmp_path


def test_a_pipeline_that_is_killed_at_each_stage_comes_to_the_same_end(
    folder: Path, box: RayBox, hub: HubServer
) -> None:
    whole, broken = Run(folder, box, "whole"), Run(folder, box, "broken")
    whole.finish()
    assert whole.result["decision"] > 0, whole.result["reason"]
    assert whole.result["pushed"].endswith(REPOSITORY)
    again = whole.result["asked_again"]  # dpo against itself, two samples of each prompt
    assert again["responses"] == 2 * again["prompts"] > 0
    (published,) = map(Path, whole.result["published"].values())
    card = yaml.safe_load((published / "README.md").read_text().split("---\n")[1])
    metrics = {metric["name"]: metric["value"] for metric in card["model-index"][0]["results"][0]["metrics"]}
    (confirmed,) = (
        measured
        for measured in whole.result["measured"]
        if (measured["alpha"], measured["half"]) == (whole.result["decision"], "confirm")
    )
    assert metrics["Gain in reward over dpo, letter"] == confirmed["gain"]["mean"] > 0
    assert pushed(hub)["README.md"] == (published / "README.md").read_bytes()
    hub.repositories.clear()

    # In the search: nothing that is stored is asked or scored again, beyond what was in flight.
    scored = "evaluation/tiny@*/*/rewards/*/*.jsonl"
    broken.kill_when(lambda: broken.files(scored), "some responses are scored")
    before = broken.rows("responses")

    # While publishing, the search done at last.
    broken.kill_when(lambda: broken.files("pairs/*/*/.expo/claim.json"), "an output is claimed")
    rows = broken.rows("responses")
    assert before <= rows
    for kind in ("responses", "rewards"):
        assert set(broken.rows(kind)) == set(whole.rows(kind))
        assert sum(broken.rows(kind).values()) - len(broken.rows(kind)) <= IN_FLIGHT

    # While pushing, the search not begun again.
    broken.kill_when(lambda: hub.repositories, "a repository is made")
    printed = broken.finish()
    assert "its search is stored" in printed
    assert "engine" not in printed
    assert broken.rows("responses") == rows
    assert broken.result["decision"] == whole.result["decision"]
    (model,) = map(Path, broken.result["published"].values())
    assert (model / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    assert pushed(hub)["expo.json"] == (model / "expo.json").read_bytes()
    assert (
        len(hub.repositories[REPOSITORY].files) == 2
    )  # what the Hub made, and one commit with the whole model

    # While reporting: the page is drawn from what is stored.
    decided = broken.result
    page = broken.output / "report" / "index.html"
    drawn = page.read_text()
    page.unlink()
    (broken.output / "results.json").unlink()
    broken.finish()
    assert broken.rows("responses") == rows
    assert len(page.read_text()) > len(drawn) / 2
    assert broken.result["measured"] == decided["measured"]

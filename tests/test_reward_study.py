"""Rewards of a real pair against the published table of its makers, who sampled with a program of their own."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec

import pytest
import yaml

from tests.ray_cluster import ROOT, Process, RayBox

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]
if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

STORIES = ROOT.parent / "shared" / "data" / "stories"
PAIR = "dpo_10pct"
ALPHAS = ("0", "0.5", "4")


def published() -> dict[str, tuple[float, float]]:
    """Mean reward and standard error by alpha at temperature 0.7; at an alpha other than 0, that of the paired difference."""
    lines = (STORIES / "TABLE.md").read_text().split("\nt0.7 ")[1].split("\n\n")[1].splitlines()
    header = [cell.strip().removeprefix("a=") for cell in lines[0].split("|")]
    (row,) = (line.split("|") for line in lines if PAIR in line)
    found = {}
    for alpha in ALPHAS:
        numbers = [float(one) for one in re.findall(r"-?\d+\.\d+", row[header.index(alpha)])]
        found[alpha] = numbers[0], numbers[-1]
    return found


def end_of(process: Process) -> int:
    for _ in range(5):
        try:
            return process.wait()
        except TimeoutError as error:
            last = error
    raise last


def test_rewards_at_three_alphas_are_those_of_the_table() -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    with RayBox(CUDA_VISIBLE_DEVICES="") as box:
        prompts = json.loads((STORIES / "test_prompts.json").read_text())
        rows = (json.dumps({"prompt": one["prompt"]}) + "\n" for one in prompts)
        (box.folder / "openings.jsonl").write_text("".join(rows))
        job = {
            "output": str(box.folder / "out"),
            "pairs": [
                {"name": "stories", "sft": str(STORIES / "sft"), "dpo": str(STORIES / PAIR), "alphas": [0, 0.5, 4]}
            ],
            "prompts": [{"source": "openings.jsonl"}],
            "sampling": {
                "temperature": 0.7, "top_p": 1, "top_k": 0, "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 64,
                "samples": 2,
            },
            "serving": {"port": 0},
            "rewards": [{"model": str(STORIES / "rm"), "backend": "transformers"}],
        }  # fmt: skip
        (box.folder / "job.yaml").write_text(yaml.safe_dump(job))
        for name in ("respond", "reward"):
            run = box.run("expo-ray", name, "job.yaml")
            assert end_of(run) == 0, run.stderr
        table = {line.split()[1]: line.split() for line in run.stdout.splitlines()[1:]}
        for alpha, (mean, error) in published().items():
            _, _, prompts_scored, ours, our_error, *_ = table[f"stories@{alpha}"]
            assert prompts_scored == str(len({one["prompt"] for one in prompts}))
            assert abs(float(ours) - mean) <= 2 * math.hypot(float(our_error), error), (alpha, ours, mean)

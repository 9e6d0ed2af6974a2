from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import chats, rounding
from benchmarks.__main__ import QUESTIONS
from benchmarks.pair import Pair, make
from tests.support.pairs import read_weights, write_pair
from tests.support.paths import ROOT


def test_every_question_has_its_script_and_says_what_it_asks() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name, question in QUESTIONS.items():
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()
        assert question in listed.stdout


# As on a machine with a GPU and little else.
WITHOUT_RAY_AND_VLLM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "vllm"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from benchmarks.__main__ import main
sys.exit(main(["gpu", "--quick"]))
"""


@pytest.mark.timeout(1200)
def test_the_check_of_a_card_runs_dry_without_one() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(sys.prefix) / "triton"),
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_RAY_AND_VLLM],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr + child.stdout
    assert "no GPU: a dry run" in child.stdout
    compared = [line for line in child.stdout.splitlines() if line.endswith("| equal |")]
    assert len(compared) == 7
    assert "bf16 | at most" in child.stdout
    # Each part that needs a card says so; none failed.
    reasons = child.stdout.partition("## not run")[2].splitlines()
    assert [line.partition(":")[0] for line in reasons if line] == [
        "- copies", "- kernel", "- command", "- swap",
    ]  # fmt: skip
    assert not (ROOT / "benchmarks" / "results" / "gpu.md").exists()


def test_a_work_phase_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    words = [
        "--sft",
        sft,
        "--dpo",
        dpo,
        "--output",
        tmp_path / "out",
        "--rounding",
        "nearest",
        "--alphas",
        "0.5",
        "1",
    ]
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.work_phase", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    work = json.loads(child.stdout)
    assert 0 < work["idle_rss"] <= work["peak_rss"]
    assert work["seconds"] > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"alpha=0.5", "alpha=1"}


def test_a_pair_is_the_same_bytes_each_time_and_moved_by_the_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for home in (tmp_path / "first", tmp_path / "second"):
        monkeypatch.setattr("benchmarks.pair.CACHE", home)
        make("tensor-1048576")
        made.append(Pair(home / "tensor-1048576" / "sft", home / "tensor-1048576" / "dpo"))
    first, second = ([read_weights(side) for side in (pair.sft, pair.dpo)] for pair in made)
    for tensors, others in zip(first, second, strict=True):
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    sft, dpo = (next(iter(side.values())).double() for side in first)
    assert sft.numel() * 2 == 1048576
    assert (dpo - sft).square().mean().sqrt() / sft.square().mean().sqrt() == pytest.approx(2.5e-3, rel=0.2)


def test_divergence_is_the_sum_over_tokens_of_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    exact, other = (torch.randn(300, 50, generator=generator) for _ in range(2))
    wanted = torch.nn.functional.kl_div(
        other.double().log_softmax(-1), exact.double().softmax(-1), reduction="sum"
    )
    assert rounding.divergence(exact, other) == pytest.approx(float(wanted), rel=1e-9)


def test_prompts_are_many_and_distinct() -> None:
    prompts = chats.prompts()
    assert len(set(prompts)) == len(prompts) >= 200

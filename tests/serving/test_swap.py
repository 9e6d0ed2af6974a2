"""The swap against engines that were started on the published folders: the same texts and logprobs to the last bit."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from expo_ray.cli.process import main
from expo_ray.config import Pair
from expo_ray.config.fields import RoundingName
from expo_ray.extrapolation.plan import plan_pair
from tests.support.chat_models import save_chat_pair
from tests.support.ray_cluster import RayBox

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

ROUNDING: RoundingName = "stochastic"
# A step, and the flags that publish the same weights.
STEPS = {"0.5": ["--alpha", "0.5"], "2,mlp=0.25": ["--alpha", "2", "--multiplier", r"\.mlp\.=0.25"]}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_after_swaps_both_ways_an_engine_answers_as_one_started_on_the_published_folder(
    tied: bool, tmp_path: Path
) -> None:
    sft, dpo = save_chat_pair(tmp_path / "parents", tied=tied, dtype=torch.bfloat16)
    answers = swaps(sft, dpo, tmp_path)
    first, second = answers["started"]
    assert first != second != answers["dpo"]
    assert answers["first"] == first
    assert answers["second"] == second
    assert answers["parents"] == "host memory"
    assert answers["first again"] == first  # from the files
    assert answers["second, made ahead"] == second
    assert answers["first, not the one expected"] == first
    # and each step is needed
    assert answers["second, cache kept"] != second
    assert answers["first, head kept"] != first
    weight = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert f"does not hold the weights of alpha 1: {weight} differ" in answers["refused"]
    assert "of this replica are unknown" in answers["health"]


@pytest.mark.slow
def test_two_workers_that_each_compute_their_slices_answer_as_two_started_on_the_published_folder(
    tmp_path: Path,
) -> None:
    sft, dpo = save_chat_pair(tmp_path / "parents", tied=False, dtype=torch.bfloat16)
    words = ["--sft", str(sft), "--dpo", str(dpo), "--alpha", "0.5", "--rounding", ROUNDING]
    assert main(["extrapolate", *words, "--output", f"{tmp_path}/published"]) == 0
    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo), rounding=ROUNDING), {})
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    arguments = [f"{tmp_path}/plan", "2", "0.5", f"{tmp_path}/published", f"{tmp_path}/answers"]
    command = [sys.executable, "-m", "tests.support.parallel_swap", *arguments]
    process = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1100)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads((tmp_path / "answers").read_text())
    assert result["swap"] == ["slices", "slices"]
    assert result["faults"] == ["", ""]
    assert result["swapped"] == result["started"] != result["dpo"]
    elements = sum(tensor.base.numel for shard in plan.shards for tensor in shard.tensors)
    # The only key head and the norms are on both.
    assert all(0.5 * elements < computed < 0.6 * elements for _, computed in result["work"])


def swaps(sft: Path, dpo: Path, folder: Path) -> dict[str, Any]:
    for step, words in STEPS.items():
        parents = ["--sft", str(sft), "--dpo", str(dpo), "--rounding", ROUNDING]
        assert main(["extrapolate", *parents, *words, "--output", str(folder / step)]) == 0
    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo), rounding=ROUNDING), {})
    (folder / "plan").write_bytes(pickle.dumps(plan))
    with RayBox() as box:
        process = box.run(
            sys.executable,
            "-m",
            "tests.support.swap_script",
            f"{folder}/plan",
            *(word for step in STEPS for word in (step, f"{folder}/{step}")),
            f"{folder}/answers",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
        )
        assert process.wait(1100) == 0, process.stderr[-3000:]
    answers: dict[str, Any] = json.loads((folder / "answers").read_text())
    return answers


def test_experts_are_packed_again_after_a_swap_and_an_engine_where_they_are_not_is_found_out() -> None:
    command = [sys.executable, "-m", "benchmarks.swap_architectures", "--here", "mixtral"]
    process = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1100)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["compared"] == result["of"]
    assert result["share"] == 1
    assert max(result["dpo"], result["0.5"], result["2"], result["0"]) < 1e-4
    assert "experts" in result["not packed again"]

"""Reward models that cannot fit, refused by the memory of the nodes before anything is downloaded; the order in which actors start."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")
pytest.importorskip("transformers")
import ray
from pydantic import ValidationError

from expo_ray.config import RewardModel
from expo_ray.errors import Problems, RewardError
from expo_ray.evaluation.placement import Node, Placement
from expo_ray.evaluation.rewards.reward_model import Classifier, check_reward, inspect_reward_model
from expo_ray.on_ray.gpus import starting_alone
from expo_ray.on_ray.rewards import backends, memory
from expo_ray.on_ray.rewards.backends import load_backend
from expo_ray.on_ray.rewards.crew import Crew, _Slot
from expo_ray.on_ray.rewards.memory import ActorNeed, check_memory
from expo_ray.on_ray.rewards.pool import RewardPool
from tests.support.tiny_reward_models import save_reward_model

GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("rm"))


def need(folder: Path, numel: int, num_gpus: float = 0, **spec: Any) -> ActorNeed:
    """A reward model of this many weights, on these GPUs."""
    checked = check_reward(RewardModel.model_validate({"model": str(folder), "name": "rm", **spec}))
    assert isinstance(checked.model, Classifier)
    return ActorNeed(replace(checked, model=replace(checked.model, numel=numel)), num_gpus)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What nodes and node groups there are, by name."""
    parts: dict[str, Any] = {"nodes": [], "groups": []}

    def nodes() -> list[dict[str, Any]]:
        return [
            {"Alive": True, "NodeID": str(number), "Resources": resources}
            for number, resources in enumerate(parts["nodes"])
        ]

    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(memory, "_node_groups", lambda: parts["groups"])
    return parts


def refusal(*needs: ActorNeed) -> str:
    with pytest.raises(Problems) as caught:
        check_memory(needs)
    return str(caught.value)


def test_weights_are_compared_with_the_largest_node_that_matches(
    folder: Path, cluster: dict[str, Any]
) -> None:
    large = need(folder, 7 * GB, dtype="fp32")
    check_memory([large])  # no node yet: an autoscaled cluster may get some
    cluster["nodes"] = [{"CPU": 0.0, "memory": 900.0 * GB}, {"CPU": 8.0, "memory": 20.0 * GB}]
    text = refusal(large)
    assert "rm: its weights take 28 GB in fp32, and the largest node has 20 GB of memory for Ray" in text
    assert "set `dtype: bf16`" in text
    check_memory([need(folder, 7 * GB, dtype="bf16")])  # the remedy
    cluster["groups"] = [{"CPU": 8.0, "memory": 64.0 * GB}]
    check_memory([large])
    cluster["groups"] = [{"CPU": 8.0, "memory": 24.0 * GB}]
    assert "the largest node has 24 GB" in refusal(large)
    cluster["groups"] = [{"CPU": 8.0}]  # its memory is not known
    check_memory([large])


def test_all_actors_on_cpus_are_compared_with_all_nodes(folder: Path, cluster: dict[str, Any]) -> None:
    cluster["nodes"] = [{"CPU": 8.0, "memory": 20.0 * GB}] * 2
    four = need(folder, 3 * GB, dtype="fp32", replicas=4)
    text = refusal(four)
    assert "take 48 GB (4 of rm with 12 GB each), and the nodes have 40 GB" in text
    assert "lower `replicas`" in text
    three = need(folder, 3 * GB, dtype="fp32", replicas=3)
    check_memory([three])
    assert "take 48 GB (3 of rm with 12 GB each, 1 of rm with 12 GB each)" in refusal(
        three, need(folder, 3 * GB, dtype="fp32")
    )
    cluster["groups"] = [{"CPU": 8.0}]
    check_memory([four])


def test_weights_are_compared_with_the_gpus(folder: Path, cluster: dict[str, Any]) -> None:
    def find(numel: int, gpu_bytes: int | None = 24 * GB, **spec: Any) -> Placement | None:
        checked = need(folder, numel).checked
        asked = replace(checked, spec=checked.spec.model_copy(update=spec))
        return RewardPool(asked, device="cuda")._find_room([Node(0, cpus=8), Node(2, gpu_bytes, 8)])

    assert find(8 * GB)
    with pytest.raises(Problems, match=r"a worker needs 37\.1 GB of GPU memory.*set `num_gpus: 2`"):
        find(15 * GB)
    assert find(15 * GB, num_gpus=2)  # the remedy
    with pytest.raises(Problems, match=r"give it at least 0\.\d+ of a GPU, or leave the share out"):
        find(6 * GB, num_gpus=0.5)
    with pytest.raises(Problems, match="use larger GPUs"):
        find(70 * GB)
    assert find(70 * GB, gpu_bytes=None)  # its driver does not say
    cluster["nodes"] = [{"CPU": 8.0, "GPU": 2.0, "memory": 10.0 * GB}]
    with pytest.raises(Problems, match=r"the largest node has 10 GB of memory"):
        find(9 * GB)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (
            {"num_gpus": 1.5},
            "1.5 is neither a share of one GPU nor a whole number; give 1 or 2, or less than 1",
        ),
        ({"num_gpus": 2, "backend": "transformers"}, "set `num_gpus: 1`, or `backend: vllm`"),
    ],
)
def test_a_job_with_a_number_of_gpus_that_means_nothing_is_refused(
    spec: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem):
        RewardModel.model_validate({"model": "rm", **spec})


def test_a_number_of_gpus_that_does_not_divide_the_heads_is_refused(folder: Path) -> None:
    assert inspect_reward_model(RewardModel(model=str(folder), num_gpus=2))  # it has two heads
    with pytest.raises(Problems, match=r"its 2 attention heads .*; set `num_gpus` to one of 1, 2"):
        inspect_reward_model(RewardModel(model=str(folder), num_gpus=3))


def test_a_model_that_only_transformers_knows_is_not_split(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expo_ray.on_ray.rewards.backends._takes_vllm", lambda *_: False)
    model = inspect_reward_model(RewardModel(model=str(folder), num_gpus=2))
    assert isinstance(model, Classifier)
    with pytest.raises(RewardError, match=r"transformers scores it, on one GPU; set `num_gpus: 1`"):
        load_backend(model, folder, "fp32", num_gpus=2)


WAITS = """
import sys
from expo_ray.on_ray.gpus import starting_alone
print("asks", flush=True)
with starting_alone(shared=len(sys.argv) > 1):
    print("has it", flush=True)
"""


def test_what_shares_gpus_starts_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    words = [sys.executable, "-c", WAITS]
    with starting_alone(shared=True):
        same = subprocess.Popen([*words, "shared"], stdout=subprocess.PIPE, text=True)
        assert same.stdout
        assert same.stdout.readline() == "asks\n"
        alone = subprocess.run(words, capture_output=True, text=True, check=True)
        assert alone.stdout == "asks\nhas it\n"  # and took longer than the first would have
        assert same.poll() is None
    assert same.communicate()[0] == "has it\n"


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_others_start_once_the_first_agrees(
    folder: Path, num_gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[bool] = []

    def start(self: Crew, number: int, *, checks: bool) -> _Slot:
        starts.append(checks)
        return _Slot(object(), f"loaded {len(starts)}", checks)  # type: ignore[arg-type]

    monkeypatch.setattr(Crew, "_start", start)
    monkeypatch.setattr(ray, "get", lambda ref: ref)
    crew = Crew(need(folder, 1000, num_gpus), [], ["SPREAD"] * 3)
    assert starts == [True]
    crew._finish_loading(crew._slots[0])
    assert starts == [True, False, False]
    crew._finish_loading(crew._slots[1])
    assert len(starts) == 3


@pytest.mark.parametrize(
    ("num_gpus", "arguments"),
    [
        (0.5, {"gpu_memory_utilization": 0.46}),
        (1, {"gpu_memory_utilization": 0.92}),
        (
            2,
            {
                "gpu_memory_utilization": 0.92,
                "tensor_parallel_size": 2,
                "distributed_executor_backend": "mp",
            },
        ),
    ],
)
def test_gpus_of_the_job_are_what_vllm_is_given(
    folder: Path, num_gpus: float, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    engine = SimpleNamespace(  # vLLM itself starts on no GPU here
        LLM=lambda **words: given.update(words), PoolingParams=lambda **_: None, __version__="0"
    )
    monkeypatch.setitem(sys.modules, "vllm", engine)
    monkeypatch.setattr(backends, "_takes_vllm", lambda *_: True)
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    model = inspect_reward_model(RewardModel(model=str(folder)))
    assert isinstance(model, Classifier)
    load_backend(model, folder, "fp32", num_gpus=num_gpus)
    asked = ("gpu_memory_utilization", "tensor_parallel_size", "distributed_executor_backend")
    assert {name: given[name] for name in asked if name in given} == arguments
    assert os.environ["TRITON_F32_DEFAULT"] == "ieee"

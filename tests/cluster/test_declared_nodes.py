"""Places that were planned, taken by real actors on nodes with declared GPUs; reward models by turns; nodes that are late."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from expo_ray.config import RewardModel
from expo_ray.evaluation.rewards.reward_model import check_reward
from tests.support.ray_cluster import RayBox
from tests.support.tiny_reward_models import english, last_token_scores, save_reward_model

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(600)]

GB = 10**9
H100, RTX4090 = 85 * GB, int(25.3 * GB)
CACHED = 2 * 2 * 32 * 8 * 128
ENGINE = {"name": "engine", "weight_bytes": 2 * 7_241_732_096, "cache_bytes": 32_768 * CACHED, "most": 4}
SEVENTY = {"name": "engine", "weight_bytes": 2 * 70_553_706_496, "cache_bytes": 32_768 * 2 * 2 * 80 * 8 * 128}
REWARDS = [
    {"name": name, "weight_bytes": 2 * numel, "cache_bytes": 16_384 * CACHED, "most": 2, "cpus": 1}
    for name, numel in (("first", 7_110_660_096), ("second", 7_504_924_672))
]


def run(box: RayBox, *words: str) -> list[dict[str, Any]]:
    process = box.run(sys.executable, "-m", "tests.support.declared_nodes", *words)
    assert process.wait(500) == 0, process.stderr[-4000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture
def box() -> Any:
    with RayBox(RAY_AUTH_MODE="disabled") as box:
        box.environment["ACTORS"] = str(box.folder / "actors")
        yield box


def test_actors_are_placed_where_it_was_planned_on_one_to_eight_gpus(box: RayBox) -> None:
    layouts: list[tuple[list[int], int, dict[str, int]]] = [
        ([1], H100, {}), ([2], H100, {}), ([1, 1], H100, {}), ([4], H100, {}), ([8], H100, {}), ([2, 2, 2, 2], H100, {}),
        ([2], RTX4090, {}), ([1], RTX4090, {}), ([4, 4], H100, {"workers": 4}),
    ]  # fmt: skip
    cases: list[dict[str, Any]] = [
        {"gpus": layout, "gpu_bytes": size, "engines": [ENGINE | more], "rewards": REWARDS}
        for layout, size, more in layouts
    ]
    cases += [
        {"gpus": gpus, "gpu_bytes": H100, "engines": [SEVENTY | {"workers": workers}], "rewards": REWARDS}
        for gpus, workers in (([4], 4), ([8], 8), ([8, 1], 8))
    ]
    lines = run(box, "placements", json.dumps(cases))
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        (engine,) = case["engines"]
        planned = [sorted(map(tuple, card)) for node in line["planned"] for card in node]
        for really in line["really"]:
            for node in really.values():
                for card in node.values():
                    assert sum(share for _, share in card) <= 100
                # All workers of an engine are on one node, each on a GPU of its own.
                holding = [sum(name == "engine" for name, _ in card) for card in node.values()]
                assert max(holding) <= 1
                assert sum(holding) % engine.get("workers", 1) == 0
        if not line["turns"]:
            cards = [
                sorted(map(tuple, card)) for node in line["really"][0].values() for card in node.values()
            ]
            assert sorted(cards) == sorted(filter(None, planned)), case
        else:
            assert len(line["really"]) == len(REWARDS) + (line["turns"] == "all")
    assert [line["turns"] for line in lines] == [""] * 6 + ["rewards", "all"] + [""] * 4


def test_reward_models_take_turns_on_one_gpu_and_leave_it(box: RayBox, tmp_path: Path) -> None:
    folders = [str(save_reward_model(tmp_path / name)) for name in ("first", "second")]
    lines = run(box, "turns", json.dumps(folders))
    actors = [json.loads(line) for line in Path(box.environment["ACTORS"]).read_text().splitlines()]
    assert {actor["name"] for actor in actors} == {"first", "second"}
    assert all(actor["gpus"] == ["0"] and actor["share"] == 0.6 for actor in actors)
    assert all(actor["living"] == [] for actor in actors)  # nobody is loaded beside another
    assert len(actors) >= 3  # of one of them an actor ended and another one came
    *scored, last = lines
    assert last == {"free": 1.0}
    assert len(scored) == 4
    reward = check_reward(RewardModel(model=folders[0], dtype="fp32"))
    for line in scored:
        asked = reward.inputs(english(24, 200)[line["first"] : line["first"] + 8])
        expected = last_token_scores(Path(folders[0]), [each.ids for each in asked])
        assert [line["rewards"][each.prompt_id] for each in asked] == pytest.approx(expected, abs=1e-4)


def test_an_engine_waits_for_gpu_nodes_that_are_late(box: RayBox) -> None:
    devices, refused, places = run(box, "late")
    assert devices == {"devices": ["cuda", "cuda"]}  # though only CPU nodes are up
    assert "the cluster has none; add GPU nodes" in refused["refused"]
    assert places == {"places": [["engine", 1, 100]]}
    (process,) = box._processes
    assert process.stderr.count("waiting for machines") >= 3

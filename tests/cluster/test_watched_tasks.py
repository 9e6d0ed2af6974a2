"""Tasks on nodes that refuse, hang or freeze are done elsewhere; a node that only fails gets no more of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expo_ray.on_ray.watched_tasks import MOST_IN_A_ROW
from tests.support.ray_cluster import RayBox, shipped_settings
from tests.support.watched_nodes import TASKS

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(600)]

# Tasks that a node with two CPUs may have begun before its third failure was known.
UNDER_WAY = 2


@pytest.fixture
def box() -> Iterator[RayBox]:
    with RayBox(RAY_AUTH_MODE="disabled", **shipped_settings()) as box:
        yield box


def run(box: RayBox, scenario: str, folder: Path) -> tuple[dict[str, Any], str]:
    process = box.run(sys.executable, "-m", "tests.support.watched_nodes", scenario, str(folder))
    assert process.wait(500) == 0, process.stderr[-4000:]
    data: dict[str, Any] = json.loads(
        process.stdout.splitlines()[-1]
    )  # Ray itself reports a dead node before it
    return data, process.stderr


def test_a_node_that_fails_three_in_a_row_gets_no_more(box: RayBox, tmp_path: Path) -> None:
    seen, log = run(box, "refused", tmp_path / "seen")
    assert sum(seen["done"].values()) == TASKS
    assert seen["bad"] not in seen["done"]
    assert MOST_IN_A_ROW <= seen["began"][seen["bad"]] <= MOST_IN_A_ROW + UNDER_WAY
    assert f"{MOST_IN_A_ROW} failures in a row; it gets no more work" in log


def test_tasks_that_hang_are_ended_and_done_elsewhere(box: RayBox, tmp_path: Path) -> None:
    seen, log = run(box, "stuck", tmp_path / "seen")
    assert sum(seen["done"].values()) == 4
    assert seen["bad"] not in seen["done"]
    assert "it moved nothing for" in log
    assert seen["stuck"] == 0, "workers that do not stop are ended"


def test_a_slow_task_that_moves_is_left_alone(box: RayBox, tmp_path: Path) -> None:
    seen, _ = run(box, "slow", tmp_path / "seen")
    assert sum(seen["began"].values()) == sum(seen["done"].values()) == 2


def test_tasks_of_a_frozen_node_are_done_elsewhere(box: RayBox, tmp_path: Path) -> None:
    seen, _ = run(box, "frozen", tmp_path / "seen")
    assert sum(seen["done"].values()) == 4
    assert seen["began"][seen["bad"]] >= 1
    assert seen["bad"] not in seen["done"]

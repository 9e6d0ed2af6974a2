"""A private Ray on loopback, beside which everything starts that starts on a cluster."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.ray_cluster import RayBox


@pytest.mark.ray
def test_a_child_of_an_actor_connects_as_a_driver(ray_box: RayBox) -> None:
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in ray_box.environment
    process = ray_box.run(sys.executable, "-m", "tests.support.nested_driver")
    assert process.wait(500) == 0, process.stderr
    reached = json.loads(process.stdout.splitlines()[-1])
    assert reached["address"].startswith("127.0.0.1:")
    assert reached["package"].endswith("expo_ray/__init__.py")

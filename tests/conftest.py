from __future__ import annotations

import pytest

pytest_plugins = [
    "tests.s3_server",
    "tests.hub_server",
    "tests.ray_cluster",
    "tests.vllm_engine",
    "tests.machines",
    "tests.stage",
    "tests.browser",
    "tests.disks",
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two streams for `make test`: tests that start engines share one endpoint, all others servers and clusters."""
    for item in items:
        stream = "engines" if item.get_closest_marker("vllm") else "others"
        item.add_marker(pytest.mark.xdist_group(stream))

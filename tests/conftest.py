from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import settings

pytest_plugins = [
    "tests.support.s3_server",
    "tests.support.gcs_gateway",
    "tests.support.azure_server",
    "tests.support.hub_server",
    "tests.support.ray_cluster",
    "tests.support.vllm_engine",
    "tests.support.machines",
    "tests.support.stage",
    "tests.support.browser",
    "tests.support.disks",
]

# No test asserts a time: on a busy machine, an example may take any.
settings.register_profile("without-deadline", deadline=None)
settings.load_profile("without-deadline")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Two streams for `make test`: tests that start engines share one endpoint, all others servers and clusters.

    Long scenarios are left out unless they are asked for by their marker.
    """
    long = pytest.mark.skip(reason="a long scenario, which `make test-cluster` runs")
    for item in items:
        if item.get_closest_marker("cluster") and "cluster" not in config.option.markexpr:
            item.add_marker(long)
        stream = "engines" if item.get_closest_marker("vllm") else "others"
        item.add_marker(pytest.mark.xdist_group(stream))
    yield
    # Two streams that mix start everything twice, and need more memory than there is.
    assert not getattr(config.option, "loadgroup", False) or all("@" in item.nodeid for item in items)


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a store up after a few attempts, where a job waits for minutes; tests of patience set their own."""
    monkeypatch.setattr("expo_ray.storage.pace.PATIENCE_S", 0.0)

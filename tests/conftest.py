from __future__ import annotations

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

"""The Ray cluster a job runs on: the one it finds itself in, or a local one."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray

log = logging.getLogger("expo_ray")

# Custom resource that bounds the shards under way on one node: what its network and disk can carry, not its cores.
SHARD_IO = "shard_io"

# Ray notices a node that vanished without a word after 7 minutes; with these, read by every process of the cluster at its
# start, after about half a minute.
KEEPALIVE = {
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_grpc_keepalive_time_ms": "10000",
    "RAY_grpc_keepalive_timeout_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_health_check_timeout_ms": "5000",
}


@contextmanager
def cluster() -> Iterator[None]:
    """Connect to the cluster named by RAY_ADDRESS or running on this machine, or start one here on loopback."""
    for name, value in KEEPALIVE.items():
        os.environ.setdefault(name, value)
    # Ray's socket paths must stay short, whatever TMPDIR is.
    with tempfile.TemporaryDirectory(prefix="expo-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        try:
            ray.init(address="auto")
            log.info("connected to the Ray cluster at %s", ray.get_runtime_context().gcs_address)
        except ConnectionError:
            if os.environ.get("RAY_ADDRESS"):
                raise
            _start(folder)
        try:
            yield
        finally:
            ray.shutdown()


def _start(folder: str) -> None:
    cpus = os.cpu_count() or 1
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody but this machine can reach it
    ray.init(
        address="local",
        num_cpus=cpus,
        resources={SHARD_IO: cpus},
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    log.info("started a local Ray of %d CPUs", cpus)

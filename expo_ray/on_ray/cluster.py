"""The Ray cluster a job runs on: the one it finds itself in, or a private one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.utils import get_num_cpus, read_ray_address

import expo_ray
from expo_ray.errors import JobError

log = logging.getLogger("expo_ray")

# Custom resource that bounds the shards under way on one node: what its network and disk can carry, not its cores.
SHARD_IO = "shard_io"

# Ray itself would ask an address where nobody answers for a quarter of an hour.
CONNECT_TIMEOUT_S = 5.0
# Only plans pass through it; weights never do.
OBJECT_STORE_BYTES = 256 << 20


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Connect to the cluster named by RAY_ADDRESS or begun on this machine with `ray start`, or start a private one.

    Raises:
        JobError: if RAY_ADDRESS names a cluster that cannot be reached.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        if address := _address():
            stack.callback(ray.shutdown)
            ray.init(logging_level=logging.WARNING, runtime_env=_code())
            log.info("connected to the Ray cluster at %s", address)
        else:
            _start(stack)
        signal.signal(
            signal.SIGTERM, on_sigterm
        )  # ray.init put its own there, which ends without cleaning up
        yield


def _address() -> str | None:
    """Where a cluster answers that was meant for this job, or None. Another program's private Ray is not."""
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return None
    if "://" in named:
        raise JobError(
            f"RAY_ADDRESS is {named}, from where jobs are submitted; run `ray job submit --working-dir . -- python "
            "jobs/extrapolate.py JOB.yaml`, or unset RAY_ADDRESS to work on this machine"
        )
    if named not in {"", "auto"}:
        if not _answers(named):
            raise JobError(
                f"RAY_ADDRESS is {named}, and nobody answers there; correct it, or unset it to work on this machine"
            )
        return named
    found: str | None = read_ray_address()
    if found and not _answers(found):
        log.info("the Ray cluster at %s, begun here with `ray start`, is gone; starting a local one", found)
        return None
    return found


def _code() -> dict[str, Any]:
    """What workers need to run this very code: a submitted job has brought it along already."""
    return {} if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ else {"py_modules": [expo_ray]}


def _answers(address: str) -> bool:
    try:
        place = urlsplit(f"//{address}")
        socket.create_connection((place.hostname or "", place.port or 0), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _start(stack: contextlib.ExitStack) -> None:
    """Start a Ray that nobody else can reach: on loopback alone, and with a token that only this user can read."""
    # Ray's socket paths must stay short, whatever TMPDIR is.
    temporary = tempfile.TemporaryDirectory(prefix="expo-ray-", dir="/tmp", ignore_cleanup_errors=True)
    folder = stack.enter_context(temporary)
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # else Ray leaves one in ~/.ray
        os.environ["RAY_AUTH_TOKEN_PATH"] = f"{folder}/token"
        stack.callback(os.environ.pop, "RAY_AUTH_TOKEN_PATH")
        Path(folder, "token").write_text(secrets.token_hex(32))
    # An engine takes minutes to start, and Serve would complain of it every half a minute.
    os.environ.setdefault("RAY_SERVE_SLOW_STARTUP_WARNING_S", "600")
    # What Ray does on macOS. Otherwise it puts the network card's address in the place of 127.0.0.1 and opens every port to
    # the network.
    ray_constants.ENABLE_RAY_CLUSTER = False
    cpus = max(1, int(get_num_cpus(override_docker_cpu_warning=True)))
    stack.callback(ray.shutdown)
    ray.init(
        address="local",
        num_cpus=cpus,
        resources={SHARD_IO: cpus},
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    log.info("started a local Ray of %d CPUs", cpus)
